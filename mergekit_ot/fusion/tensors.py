"""The tensors of a fusion: those of the sources while they are needed, and the fused ones as they are completed."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mergekit_ot.fusion.alignment import Alignment
from mergekit_ot.fusion.moving import moved_parameter, transport_parameter
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.graph.blocks import Block, blocks_of, group_places, spread_along
from mergekit_ot.graph.layouts import IN, leaf_groups
from mergekit_ot.transport.averaging import Share, mean_over_present

# Sums of squares in double precision of numbers in single precision.
_ROUNDING = 1e-8


class SourceTensors:
    """Reads parameters of the sources onto the device, and keeps them until they are released."""

    def __init__(self, sources: Sequence[SourceModel], device: torch.device) -> None:
        self.sources, self.device = sources, device
        self._held: dict[tuple[int, str], Tensor] = {}
        self._lock = threading.Lock()

    def read(self, source: int, name: str) -> Tensor:
        """Returns a parameter of a source on the device, in single precision where it is less."""
        with self._lock:
            if (source, name) not in self._held:
                self._held[source, name] = computed(self.sources[source].state.read(name), self.device)
            return self._held[source, name]

    def release(self, names: Iterable[str] | None = None) -> None:
        """Lets go of parameters, of all where no names are given."""
        with self._lock:
            if names is None:
                self._held.clear()
                return
            for name in names:
                for source in range(len(self.sources)):
                    self._held.pop((source, name), None)

    def fused(self, name: str, alignment: Alignment, model_weights: Sequence[float]) -> Tensor:
        """Returns the weighted mean of a parameter over the aligned sources.

        A fused neuron that has no partner in some source is the mean over the others. Of masks it is the share that
        has them set; whole numbers have no mean, and come from the first source that has weight.
        """
        shares = _moved(self, name, alignment, model_weights)
        first = next(shares, None)
        if first is None:
            return mean_over_present(())
        if not (first.values.is_floating_point() or first.values.is_complex()):
            return first.values
        return mean_over_present(itertools.chain([first], shares))


def computed(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor as it is computed with: on the device, in single precision where it is less."""
    tensor = tensor.detach().to(device)
    is_short = tensor.is_floating_point() and tensor.dtype.itemsize < 4
    return tensor.float() if is_short or tensor.dtype is torch.bool else tensor


class ReadsParameters(Protocol):
    """Gives the sources' parameters."""

    def read(self, source: int, name: str) -> Tensor:
        """Returns a parameter of a source."""
        ...


def _moved(
    tensors: ReadsParameters, name: str, alignment: Alignment, model_weights: Sequence[float]
) -> Iterator[Share]:
    """Yields a parameter of each aligned source that has weight, one source at a time."""
    for source, weight in enumerate(model_weights):
        if weight > 0:
            moved = transport_parameter(tensors.read(source, name), name, alignment, source)
            yield Share(weight, moved, presence_of(name, alignment, source, moved))


def presence_of(name: str, alignment: Alignment, source: int, like: Tensor) -> Tensor | None:
    """Returns 1 where a fused parameter has a counterpart in a source and 0 elsewhere; None where all of it has one.

    Only axes that own neurons count: what reads a neuron that a source lacks reads nothing from that source.
    """
    present = _presence_by_axis(name, alignment, source, like)
    if not present:
        return None
    result = torch.ones_like(like.real)
    for block in blocks_of(result, alignment.moved_layouts(source, name)):
        _clear_absent(block, present)
    return result


def _presence_by_axis(name: str, alignment: Alignment, source: int, like: Tensor) -> dict[tuple[int, str], Tensor]:
    """Returns (axis, group) → 1 where the source has the neuron and 0 elsewhere, for the groups that lack some."""
    present: dict[tuple[int, str], Tensor] = {}
    for axis, layout in enumerate(alignment.target.layouts[name]):
        for group in leaf_groups(layout):
            if group not in alignment.couplings or alignment.target.groups[group].context:
                continue
            here = alignment.coupling(group, source).presence(like)
            if here is not None and alignment.role(source, name, axis, group) != IN:
                present[axis, group] = here
    return present


def _clear_absent(block: Block, present: Mapping[tuple[int, str], Tensor]) -> None:
    for place, group in group_places(block):
        here = present.get((block.dimensions[place].axis, group))
        if here is not None:
            block.view.mul_(spread_along(here, place, block.view.ndim))


@dataclass(frozen=True)
class Spread:
    """What couplings leave apart in some parameters: ``Σ λ_i |θ_i − θ̄|²`` over aligned sources and their mean.

    Attributes:
        apart: It.
        moment: ``Σ λ_i |θ_i|²``, to which its rounding is relative.
    """

    apart: float
    moment: float

    def is_below(self, other: Spread) -> bool:
        """Whether less is left apart than under other couplings, beyond rounding."""
        return self.apart < other.apart - _ROUNDING * max(self.moment, other.moment)


def spread_of(
    tensors: ReadsParameters,
    alignment: Alignment,
    model_weights: Sequence[float],
    structure_weight: float = 1.0,
    names: Iterable[str] | None = None,
    squares: dict[tuple[int, str, int | None], float] | None = None,
) -> Spread | None:
    """Returns what couplings leave apart in some parameters, None where some neurons are kept apart.

    Args:
        tensors: Gives the sources' parameters.
        alignment: The couplings.
        model_weights: One per source.
        structure_weight: Weight of parameters in which a group refers to itself (``alpha``).
        names: The parameters; all that are no buffers, where none are given.
        squares: (source, parameter, number of the block or None for all) → its squared norm, where it is known; it is
            added to.
    """
    squares = {} if squares is None else squares
    counting = [source for source, weight in enumerate(model_weights) if weight > 0]
    apart, moment, nothing = 0.0, 0.0, torch.empty(0)
    for name in alignment.target.layouts if names is None else names:
        if name in alignment.target.buffers or name in alignment.uncompared:
            continue
        if any(_presence_by_axis(name, alignment, source, nothing) for source in range(len(model_weights))):
            return None
        read = [(source, model_weights[source], tensors.read(source, name)) for source in counting]
        total = sum(
            weight * _moved_squares(tensor, name, alignment, source, squares) for source, weight, tensor in read
        )
        mean = mean_over_present(
            Share(weight, moved_parameter(tensor, name, alignment, source)) for source, weight, tensor in read
        )
        factor = structure_weight if _refers_to_itself(name, alignment) else 1.0
        apart += (total - _squared(mean)) * factor
        moment += total * factor
    return Spread(apart, moment)


def alignment_objective(
    tensors: ReadsParameters, alignment: Alignment, model_weights: Sequence[float], structure_weight: float = 1.0
) -> float | None:
    """Returns what all couplings together leave apart: ``Σ λ_i |θ_i − θ̄|²`` over aligned sources and their mean.

    For couplings that are no permutations it is the transport cost under the product of the couplings, so that a
    blurred source does not count as a near one. None where some neurons are kept apart.

    Args:
        tensors: Gives the sources' parameters.
        alignment: The couplings.
        model_weights: One per source.
        structure_weight: Weight of parameters in which a group refers to itself (``alpha``).
    """
    spread = spread_of(tensors, alignment, model_weights, structure_weight)
    return None if spread is None else spread.apart


def _moved_squares(
    tensor: Tensor, name: str, alignment: Alignment, source: int, squares: dict[tuple[int, str, int | None], float]
) -> float:
    """Returns the squared norm of a source's parameter in the fused model's scale."""
    graph, fused = alignment.graphs[source], alignment.target.groups
    held = {key for layout in graph.layouts[name] for key in leaf_groups(layout)}
    if all(fused[key].size == graph.groups[key].size for key in held):
        if (source, name, None) not in squares:
            squares[source, name, None] = _squared(tensor)
        return squares[source, name, None]
    total = 0.0
    for number, block in enumerate(blocks_of(tensor, graph.layouts[name])):
        factor = 1.0
        for place, group in group_places(block):
            if group in alignment.couplings:
                ratio = fused[group].size / graph.groups[group].size
                is_reader = alignment.role(source, name, block.dimensions[place].axis, group) == IN
                factor *= 1 / ratio if is_reader else ratio
        if (source, name, number) not in squares:
            squares[source, name, number] = _squared(block.view)
        total += factor * squares[source, name, number]
    return total


def _refers_to_itself(name: str, alignment: Alignment) -> bool:
    held: list[str] = []
    for layout in alignment.target.layouts[name]:
        held += leaf_groups(layout)
    return any(held.count(key) > 1 for key in held if key in alignment.couplings)


def _squared(tensor: Tensor) -> float:
    precise = tensor.to(torch.complex128) if tensor.is_complex() else tensor.double()
    return float(torch.linalg.vector_norm(precise)) ** 2
