"""Neurons seen by their weights, block by block: costs are sums of products that are kept between sweeps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot.fusion.alignment import Alignment, FamilyCoupling
from mergekit_ot.fusion.moving import transport_block
from mergekit_ot.fusion.tensors import ReadsParameters
from mergekit_ot.graph.blocks import Block, real_blocks_of, rows_along
from mergekit_ot.graph.layouts import leaf_groups
from mergekit_ot.transport.coupling import Coupling
from mergekit_ot.transport.support import AbstractDeferredSupport

# Beyond this part of changed neurons a product is taken anew: two smaller ones would cost as much.
_LARGEST_CHANGE = 0.6

# Group → the coupling that a block stood under.
Held = Mapping[str, Coupling | FamilyCoupling]


@dataclass(frozen=True)
class _Product:
    """Inner products of the rows of two sources in one block, and the couplings beside the group that they hold for."""

    values: Float[Tensor, "n m"]
    ours: Held
    theirs: Held


@dataclass
class KeptProducts:
    """What the last visit of a group left for the next: products of blocks, and what never changes of their rows.

    Example:
        >>> kept = KeptProducts()
        >>> again = kept.copy()
        >>> again.norms["key"] = torch.zeros(1)
        >>> kept.norms
        {}
    """

    products: dict[tuple[str, int, str, int, int], _Product] = field(default_factory=dict)
    norms: dict[tuple[object, ...], Tensor] = field(default_factory=dict)
    squares: dict[tuple[int, str, int | None], float] = field(default_factory=dict)

    def copy(self) -> KeptProducts:
        """Returns one that can be added to while this one stays as it is."""
        return KeptProducts(dict(self.products), dict(self.norms), dict(self.squares))


@dataclass(frozen=True)
class DescribingBlock:
    """A block that describes a group's neurons in one source.

    Attributes:
        name: The parameter.
        number: Number of the block among those of the group.
        block: The block.
        place: Dimension of the group.
        factor: What its numbers are multiplied by, so that groups of different size compare.
    """

    name: str
    number: int
    block: Block
    place: int
    factor: float

    @property
    def key(self) -> tuple[str, int, str]:
        """Tells the block from the group's others."""
        return self.name, self.number, self.block.dimensions[self.place].group or ""

    def beside(self, alignment: Alignment, source: int) -> dict[str, Coupling | FamilyCoupling]:
        """Returns the couplings in force of all groups that stand beside the neurons, and of what indexes those."""
        held: dict[str, Coupling | FamilyCoupling] = {}
        for place, dimension in enumerate(self.block.dimensions):
            if place == self.place or dimension.group is None:
                continue
            for key in (dimension.group, *alignment.target.groups[dimension.group].context):
                if key in alignment.couplings:
                    held[key] = alignment.couplings[key][source]
        return held


class WeightRows(AbstractDeferredSupport):
    """A group's neurons in one source, seen by blocks whose other dimensions are only reordered.

    Args:
        blocks: Those that describe the group.
        alignment: The couplings in force.
        source: Number of the source.
        kept: What the last visit left; it is added to.
        join: Returns the rows of all blocks side by side.
    """

    def __init__(
        self,
        blocks: Sequence[DescribingBlock],
        alignment: Alignment,
        source: int,
        kept: KeptProducts,
        join: Callable[[], Tensor],
    ) -> None:
        self.blocks, self.alignment, self.source, self.kept = blocks, alignment, source, kept
        self._join = join
        views = [each.block.view for each in blocks]
        columns = sum(view.numel() // max(view.shape[each.place], 1) for view, each in zip(views, blocks, strict=True))
        self.shape = views[0].shape[blocks[0].place], columns
        self.device, self.dtype = views[0].device, views[0].dtype
        for view in views:
            self.dtype = torch.promote_types(self.dtype, view.dtype)

    def join(self) -> Float[Tensor, "n d"]:
        """Returns the rows of all blocks side by side."""
        return self._join()

    def squared_norms(self) -> Float[Tensor, " n"]:
        """Returns the squared norm of each row; what stands beside the neurons is only reordered."""
        key = (self.source, tuple(each.key for each in self.blocks))
        if key not in self.kept.norms:
            norms = (self._squares(each) for each in self.blocks)
            self.kept.norms[key] = sum(norms, self._zeros(self.shape[0]))
        return self.kept.norms[key]

    def row_maxima(self) -> Float[Tensor, " n"]:
        """Returns the largest absolute value in each row."""
        maxima = [
            rows_along(each.block.view.detach(), each.place).abs().amax(1) * abs(each.factor)
            for each in self.blocks
            if each.block.view.numel()
        ]
        return torch.stack(maxima).amax(0) if maxima else self._zeros(self.shape[0])

    def products(self, other: AbstractDeferredSupport) -> Float[Tensor, "n m"] | None:
        """Returns the sum of the products of all blocks, those kept where nothing beside them changed."""
        if not isinstance(other, WeightRows):
            return None
        total: Tensor | None = None
        for ours, theirs in zip(self.blocks, other.blocks, strict=True):
            product, factor = self._product(other, ours, theirs), ours.factor * theirs.factor
            total = product * factor if total is None else total.add_(product, alpha=factor)
        return self._zeros(self.shape[0], other.shape[0]) if total is None else total

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.promote_types(self.dtype, torch.float32), device=self.device)

    def _squares(self, each: DescribingBlock) -> Float[Tensor, " n"]:
        key = (*each.key, self.source)
        if key not in self.kept.norms:
            view = each.block.view.detach()
            squares = view.to(torch.promote_types(view.dtype, torch.float32)).square()
            beside = [other for other in range(view.ndim) if other != each.place]
            self.kept.norms[key] = squares.sum(beside) if beside else squares
        return self.kept.norms[key] * each.factor**2

    def _product(self, other: WeightRows, ours: DescribingBlock, theirs: DescribingBlock) -> Tensor:
        key = (*ours.key, self.source, other.source)
        held = ours.beside(self.alignment, self.source), theirs.beside(other.alignment, other.source)
        before = self.kept.products.get(key)
        if before is None or not _is_same(before.ours, held[0]):
            values = self._rows(ours) @ other._rows(theirs).T
        elif _is_same(before.theirs, held[1]):
            return before.values
        else:
            values = self._updated(before, other, ours, theirs, held[1])
        self.kept.products[key] = _Product(values, *held)
        return values

    def _rows(self, each: DescribingBlock) -> Float[Tensor, "n d"]:
        view = transport_block(each.block, each.name, self.alignment, self.source, frozenset([each.place]))
        return rows_along(view.detach(), each.place).to(torch.promote_types(self.dtype, torch.float32))

    def _updated(
        self, before: _Product, other: WeightRows, ours: DescribingBlock, theirs: DescribingBlock, held: Held
    ) -> Tensor:
        """Returns products after some neurons beside the group were exchanged: those of these neurons change."""
        exchanged = _exchanged(before.theirs, held, theirs)
        if exchanged is None:
            return self._rows(ours) @ other._rows(theirs).T
        place, old, new = exchanged
        moved = (old != new).nonzero()[:, 0]
        own = transport_block(ours.block, ours.name, self.alignment, self.source, frozenset([ours.place]))
        first = rows_along(own.detach().index_select(place, moved), ours.place)
        view = theirs.block.view.detach()
        gained = view.index_select(place, new[moved]) - view.index_select(place, old[moved])
        second = rows_along(gained, theirs.place)
        return torch.addmm(before.values, first.to(before.values), second.to(before.values).T)


def _exchanged(before: Held, after: Held, each: DescribingBlock) -> tuple[int, Tensor, Tensor] | None:
    """Returns the one dimension along which neurons changed places, and the orders; None where there is more."""
    groups = [dimension.group for dimension in each.block.dimensions]
    beside = [place for place, key in enumerate(groups) if place != each.place and key in after]
    if len(beside) != 1 or len(before) != 1 or len(after) != 1:
        return None
    place = beside[0]
    old, new = before.get(groups[place] or ""), after[groups[place] or ""]
    if not isinstance(old, Coupling) or not isinstance(new, Coupling):
        return None
    if any(len(coupling.tensors) != 1 for coupling in (old, new)):
        return None
    device = each.block.view.device
    orders = old.partners().to(device), new.partners().to(device)
    changed = float((orders[0] != orders[1]).float().mean())
    return None if changed > _LARGEST_CHANGE else (place, *orders)


def _is_same(before: Held, after: Held) -> bool:
    """Whether the same couplings are in force."""
    if before.keys() != after.keys():
        return False
    return all(old is after[key] or old.is_same(after[key]) for key, old in before.items())


def are_only_reordered(blocks: Sequence[DescribingBlock], alignment: Alignment, source: int) -> bool:
    """Whether all that stands beside the neurons is moved by permutations alone."""
    return all(coupling.is_permutation for each in blocks for coupling in each.beside(alignment, source).values())


def agreement(tensors: ReadsParameters, alignment: Alignment, model_weights: Sequence[float]) -> float:
    """Returns ``Σ_{i<j} λ_i λ_j ⟨θ_i, θ_j⟩`` over aligned sources: all of the objective that permutations change.

    Args:
        tensors: Gives the sources' parameters.
        alignment: Permutations of all groups.
        model_weights: One per source.
    """
    total = 0.0
    for name in _parameters(alignment):
        moved = [
            [
                transport_block(block, name, alignment, source)
                for block in real_blocks_of(tensors.read(source, name).detach(), alignment.graphs[source].layouts[name])
            ]
            for source in range(len(model_weights))
        ]
        for one, other in _pairs(model_weights):
            products = (_inner(ours, theirs) for ours, theirs in zip(moved[one], moved[other], strict=True))
            total += model_weights[one] * model_weights[other] * sum(products)
    return total


def agreement_found(
    kept: Iterable[KeptProducts], alignment: Alignment, tensors: ReadsParameters, model_weights: Sequence[float]
) -> float | None:
    """Returns `agreement` from the products of a sweep that started from nothing; None where they do not tell it all.

    Such a sweep sees every block once: when the last of its groups is aligned.

    Args:
        kept: What the steps of the sweep left.
        alignment: What it found.
        tensors: Gives the sources' parameters.
        model_weights: One per source.
    """
    names = {name for name in _parameters(alignment) if _holds_any(name, alignment)}
    total = 0.0
    entries = {key: found for each in kept for key, found in each.products.items()}
    pairs = list(_pairs(model_weights))
    if len(entries) != len(names) * len(pairs) or {key[0] for key in entries} != names:
        return None
    for (_, _, group, one, other), found in entries.items():
        ours, theirs = (alignment.couplings[group][source] for source in (one, other))
        if not isinstance(ours, Coupling) or not isinstance(theirs, Coupling):
            return None
        diagonal = found.values[ours.partners(), theirs.partners()]
        total += model_weights[one] * model_weights[other] * float(diagonal.double().sum())
    untouched = [name for name in _parameters(alignment) if name not in names]
    return total + sum(_identity_agreement(tensors, name, model_weights) for name in untouched)


def _identity_agreement(tensors: ReadsParameters, name: str, model_weights: Sequence[float]) -> float:
    read = [tensors.read(source, name).detach() for source in range(len(model_weights))]
    return sum(
        model_weights[one] * model_weights[other] * _inner(read[one], read[other])
        for one, other in _pairs(model_weights)
    )


def _holds_any(name: str, alignment: Alignment) -> bool:
    return any(alignment.couplings.keys() & set(leaf_groups(layout)) for layout in alignment.target.layouts[name])


def _parameters(alignment: Alignment) -> list[str]:
    followers = alignment.target.buffers | alignment.uncompared
    return [name for name in alignment.target.layouts if name not in followers]


def _pairs(model_weights: Sequence[float]) -> Iterator[tuple[int, int]]:
    return itertools.combinations([source for source, weight in enumerate(model_weights) if weight > 0], 2)


def _inner(ours: Tensor, theirs: Tensor) -> float:
    """Returns the inner product of two tensors of one shape."""
    if ours.is_complex():
        ours, theirs = torch.view_as_real(ours), torch.view_as_real(theirs)
    if not ours.is_floating_point():
        return float((ours.double() * theirs.double()).sum())
    return float(torch.dot(ours.reshape(-1), theirs.reshape(-1)))
