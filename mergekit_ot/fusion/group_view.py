"""What a neuron is seen by: the view of a group that node measures are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mergekit_ot.fusion.alignment import PAPER, Alignment
from mergekit_ot.fusion.moving import transport_block
from mergekit_ot.fusion.weight_rows import DescribingBlock, KeptProducts, WeightRows, are_only_reordered
from mergekit_ot.graph.blocks import Block, gate_dimension, places_of, real_blocks_of, rows_along
from mergekit_ot.graph.layouts import IN, OUT
from mergekit_ot.transport.measure import Signs
from mergekit_ot.transport.scale import squarable
from mergekit_ot.transport.solver import Scope
from mergekit_ot.transport.support import AbstractDeferredSupport


@dataclass(frozen=True)
class GroupView:
    """One neuron group in all sources, as node measures see it.

    Attributes:
        group: Key of the group.
        alignment: What is aligned so far.
        scope: Which tensors describe a neuron.
        read: Gives a parameter of a source: ``read(source, name)``.
        wants_structure: Whether a group that does not refer to itself gets the distances between its neurons.
        responses: Gives, per source, the neurons' responses to calibration data, or None where there are none.
        members: ``all``, or ``first`` to describe neurons by the first layer that makes them alone.
        kept: Products of weights that an earlier visit left, and to which this one adds.

    Example:
        Neurons of the first layer are seen by their weights and their bias:

        >>> from types import SimpleNamespace
        >>> from torch import nn
        >>> from mergekit_ot import AbstractNodeMeasure, NeuronMeasure, PluginManager, fuse, hookimpl
        >>> class Looking(AbstractNodeMeasure):
        ...     def measure(self, view):
        ...         print(view.group, [tuple(view.weights(source).shape) for source in range(view.count)])
        ...         return tuple(NeuronMeasure.uniform(view.weights(source)) for source in range(view.count))
        >>> manager = PluginManager.load()
        >>> hook = hookimpl(lambda: {"looking": Looking})
        >>> manager.register(SimpleNamespace(mergeot_node_measures=hook), "mine")
        >>> nets = [nn.Sequential(nn.Linear(4, size), nn.ReLU(), nn.Linear(size, 2)) for size in (8, 6)]
        >>> result = fuse(nets, solver="wb", measure="looking", example_inputs=torch.randn(2, 4), manager=manager)
        0.weight:0 [(8, 5), (6, 5)]
    """

    group: str
    alignment: Alignment
    scope: Scope
    read: Callable[[int, str], Tensor]
    wants_structure: bool = False
    responses: Callable[[str, bool], list[Tensor] | None] | None = None
    members: str = "all"
    kept: KeptProducts = field(default_factory=KeptProducts)

    @property
    def count(self) -> int:
        """Number of sources."""
        return len(self.alignment.graphs)

    def size(self, source: int) -> int:
        """Number of neurons of the group in a source."""
        return self.alignment.graphs[source].groups[self.group].size

    def weights(self, source: int) -> Float[Tensor, "n d"]:
        """Returns one row per neuron: every tensor in scope whose other axes are aligned, in fused coordinates.

        Rows of readers (role IN) are scaled to densities, so that groups of different size compare.
        """
        return self._joined(self._blocks(source), source)

    def rows(self, source: int) -> Float[Tensor, "n d"] | AbstractDeferredSupport:
        """Returns what `weights` does, to be joined only if somebody asks for the rows, wherever that is possible.

        It is where all that stands beside the neurons is only reordered: then costs are sums over blocks.
        """
        blocks = self._blocks(source)
        if not blocks or not are_only_reordered(blocks, self.alignment, source):
            return self._joined(blocks, source)
        return WeightRows(blocks, self.alignment, source, self.kept, lambda: self._joined(blocks, source))

    def _blocks(self, source: int) -> list[DescribingBlock]:
        density = self._density(source)
        factors = {IN: 1.0 if self.alignment.scaling == PAPER else density}
        return [
            DescribingBlock(name, number, block, place, factors.get(role, 1.0))
            for number, (name, block, place, role) in enumerate(self._described(source))
        ]

    def _joined(self, blocks: Sequence[DescribingBlock], source: int) -> Float[Tensor, "n d"]:
        rows = []
        for each in blocks:
            moved = transport_block(each.block, each.name, self.alignment, source, frozenset([each.place]))
            row = rows_along(moved, each.place)
            rows.append(row if each.factor == 1 else row * each.factor)
        return torch.cat(rows, 1) if rows else torch.zeros(self.size(source), 0)

    def structure(self, source: int) -> Float[Tensor, "s n n"] | None:
        """Returns the matrices in which the group refers to itself, or distances between neurons, or None."""
        channels = []
        size = self.size(source)
        for name, block, places in self._self_referring(source):
            moved = transport_block(block, name, self.alignment, source, frozenset(places))
            channels.append(moved.movedim(places, (0, 1)).reshape(size, size, -1).movedim(2, 0))
        if channels:
            structure = torch.cat(channels, 0)
            # The paper compares the numbers themselves; a solver compares densities, which this undoes.
            return structure / self._density(source) if self.alignment.scaling == PAPER else structure
        return self._distances(source)[None] if self.wants_structure else None

    def signs(self) -> Signs | None:
        """Returns what follows a neuron's direction, as `weights` and `structure` are ordered; None where none may."""
        symmetry = self.alignment.directions.get(self.group)
        if symmetry is None:
            return None
        columns, rows, readers = [], [], []
        for name, block, place, _ in self._described(0):
            columns.append(self._answers(name, block, place, [place], self._fused_sizes(block)).flatten())
        for name, block, places in self._self_referring(0):
            sizes = [dimension.size for dimension in block.dimensions]
            for answers, place in zip((rows, readers), places, strict=True):
                answers.append(self._answers(name, block, place, places, sizes).flatten())
        none = torch.zeros(0, dtype=torch.bool)
        # A group that does not refer to itself has one channel of structure, of distances.
        distances = torch.zeros(int(self.wants_structure), dtype=torch.bool)
        found = (
            torch.cat(answers or [empty])
            for answers, empty in ((columns, none), (rows, distances), (readers, distances))
        )
        return Signs(*found, symmetry=symmetry)

    def _described(self, source: int) -> Iterator[tuple[str, Block, int, str]]:
        """Yields (parameter, block, dimension of the group, role) for every block that describes a neuron."""
        described = []
        for name, block in self.blocks(source):
            places = places_of(block, self.group)
            if len(places) != 1 or not self._is_aligned_beside(block):
                continue
            role = self._role(source, name, block, places[0])
            if role == OUT or self.scope is not Scope.INCOMING:
                described.append((name, block, places[0], role))
        deciding = self._first_layer(described) if self.members == "first" else None
        for name, block, place, role in described:
            if deciding is None or role == IN or name.rpartition(".")[0] == deciding:
                yield name, block, place, role

    def _is_aligned_beside(self, block: Block) -> bool:
        """Whether all that stands beside the group in a block is aligned already, or stays in place."""
        return all(d.group == self.group or self.alignment.is_aligned(d.group) for d in block.dimensions)

    def _first_layer(self, described: list[tuple[str, Block, int, str]]) -> str | None:
        """Returns the path of the first module, in order of definition, with a weight that makes the neurons."""
        makers = {name for name, block, _, role in described if role != IN and len(block.dimensions) > 1}
        return next((name.rpartition(".")[0] for name in self.alignment.target.layouts if name in makers), None)

    def _self_referring(self, source: int) -> Iterator[tuple[str, Block, list[int]]]:
        """Yields (parameter, block, [owning dimension, reading dimension]) where the group stands twice."""
        for name, block in self.blocks(source):
            places = places_of(block, self.group)
            if len(places) == 2 and self._is_aligned_beside(block):
                places.sort(key=lambda p: self._role(source, name, block, p) == IN)
                yield name, block, places

    def _answers(self, name: str, block: Block, place: int, without: list[int], sizes: list[int]) -> Bool[Tensor, ...]:
        """Returns whether each number beside a neuron changes sign with it: a mask over the other dimensions."""
        answers = self.alignment.direction_answers(name, block.dimensions[place].axis, self.group)
        gates = gate_dimension(block, place, answers)
        shape = [len(answers) if p == gates else 1 for p in range(len(sizes)) if p not in without]
        full = [size for p, size in enumerate(sizes) if p not in without]
        return torch.tensor(answers).reshape(shape).expand(full)

    def _fused_sizes(self, block: Block) -> list[int]:
        groups = self.alignment.target.groups
        return [d.size if d.group is None else groups[d.group].size for d in block.dimensions]

    def _density(self, source: int) -> float:
        """Returns what makes a number that reads a neuron a density over the fused group's neurons."""
        return self.size(source) / self.alignment.target.groups[self.group].size

    def _distances(self, source: int) -> Float[Tensor, "n n"]:
        """Returns the distances between the neurons' own incoming weights: they need no alignment of another group.

        Where a neuron may be negated, the smaller of its distances with either sign.
        """
        odd, even = [], []
        for name, block in self.blocks(source):
            places = places_of(block, self.group)
            if len(places) == 1 and self._role(source, name, block, places[0]) != IN:
                row = rows_along(self._as_density(source, name, block), places[0])
                sizes = [dimension.size for dimension in block.dimensions]
                changes = self._answers(name, block, places[0], places, sizes).flatten()
                odd.append(row[:, changes])
                even.append(row[:, ~changes])
        squares, dtype = torch.zeros(self.size(source), self.size(source)), torch.float32
        if even:
            dtype = even[0].dtype
            (own,) = squarable(torch.cat(even, 1))
            squares = torch.cdist(own, own).square()
        if odd:
            dtype = odd[0].dtype
            (own,) = squarable(torch.cat(odd, 1))
            squares = squares + torch.minimum(torch.cdist(own, own), torch.cdist(own, -own)).square().fill_diagonal_(0)
        fused = self.alignment.target.groups[self.group].size
        # Scaled so that the structure term is the mean over pairs of neurons, whatever the sizes are.
        return (squares.sqrt() * (fused**0.5 / self.size(source))).to(dtype)

    def _as_density(self, source: int, name: str, block: Block) -> Tensor:
        """Returns a block with its norm kept where the layers that it reads have another width in the fused model."""
        view = block.view
        for dimension in block.dimensions:
            key = dimension.group
            if key is None or key == self.group:
                continue
            if self.alignment.graphs[source].roles.get((name, dimension.axis, key)) == IN:
                view = view * (dimension.size / self.alignment.target.groups[key].size) ** 0.5
        return view

    def activations(self, standardised: bool = False) -> list[Float[Tensor, "n d"]] | None:
        """Returns, per source, rows whose distances are those of the neurons' centred responses to calibration data.

        Args:
            standardised: Whether every neuron's responses are scaled to unit variance (correlation).
        """
        return self.responses(self.group, standardised) if self.responses is not None else None

    def _role(self, source: int, name: str, block: Block, place: int) -> str:
        return self.alignment.graphs[source].roles[name, block.dimensions[place].axis, self.group]

    def blocks(self, source: int) -> Iterator[tuple[str, Block]]:
        """Yields (parameter, block) for every block of a source's parameters in which the group stands."""
        graph = self.alignment.graphs[source]
        names = dict.fromkeys(slot.parameter for slot in graph.groups[self.group].members)
        for name in names:
            # Running statistics say where the data lie, not what a neuron is; they follow the coupling only, as heads
            # of other classes do.
            if name not in graph.buffers and name not in self.alignment.uncompared:
                for block in real_blocks_of(self.read(source, name), graph.layouts[name]):
                    if places_of(block, self.group):
                        yield name, block
