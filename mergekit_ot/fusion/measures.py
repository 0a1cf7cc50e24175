"""What a neuron is seen by: the view of a group that node measures are made from."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot.fusion.alignment import Alignment, transport_block
from mergekit_ot.graph.blocks import Block, blocks_of
from mergekit_ot.graph.ir import IN
from mergekit_ot.transport.measure import NeuronMeasure
from mergekit_ot.transport.solver import Scope


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
    """

    group: str
    alignment: Alignment
    scope: Scope
    read: Callable[[int, str], Tensor]
    wants_structure: bool = False
    responses: Callable[[str, bool], list[Tensor] | None] | None = None

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
        rows = []
        fused = self.alignment.target.groups[self.group].size
        for name, block in self.blocks(source):
            places = [p for p, d in enumerate(block.dimensions) if d.group == self.group]
            others = [d.group for p, d in enumerate(block.dimensions) if p not in places]
            if len(places) != 1 or not all(self.alignment.is_aligned(other) for other in others):
                continue
            role = self._role(source, name, block, places[0])
            if role == IN and self.scope is Scope.INCOMING:
                continue
            moved = transport_block(block, name, self.alignment, source, frozenset(places))
            row = moved.movedim(places[0], 0).reshape(self.size(source), -1)
            rows.append(row * (self.size(source) / fused) if role == IN else row)
        return torch.cat(rows, 1) if rows else torch.zeros(self.size(source), 0)

    def structure(self, source: int) -> Float[Tensor, "s n n"] | None:
        """Returns the matrices in which the group refers to itself, or distances between neurons, or None."""
        found = []
        for name, block in self.blocks(source):
            places = [p for p, d in enumerate(block.dimensions) if d.group == self.group]
            others = [d.group for p, d in enumerate(block.dimensions) if p not in places]
            if len(places) == 2 and all(self.alignment.is_aligned(other) for other in others):
                places.sort(key=lambda p: self._role(source, name, block, p) == IN)
                moved = transport_block(block, name, self.alignment, source, frozenset(places))
                size = self.size(source)
                found.append(moved.movedim(places, (0, 1)).reshape(size, size, -1).movedim(2, 0))
        if found:
            return torch.cat(found, 0)
        return self._distances(source)[None] if self.wants_structure else None

    def _distances(self, source: int) -> Float[Tensor, "n n"]:
        """Returns the distances between the neurons' own incoming weights: they need no alignment of another group."""
        rows = []
        for name, block in self.blocks(source):
            places = [p for p, d in enumerate(block.dimensions) if d.group == self.group]
            if len(places) == 1 and self._role(source, name, block, places[0]) != IN:
                rows.append(block.view.movedim(places[0], 0).reshape(self.size(source), -1))
        own = torch.cat(rows, 1) if rows else torch.zeros(self.size(source), 1)
        fused = self.alignment.target.groups[self.group].size
        # Scaled so that the structure term is the mean over pairs of neurons, whatever the sizes are.
        return torch.cdist(own, own) * (fused**0.5 / self.size(source))

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
            # Running statistics say where the data lie, not what a neuron is; they follow the coupling only.
            if name not in graph.buffers:
                for block in blocks_of(self.read(source, name), graph.layouts[name]):
                    if any(dimension.group == self.group for dimension in block.dimensions):
                        yield name, block


class AbstractNodeMeasure(abc.ABC):
    """Describes the neurons of a group in every source as measures with a common support space.

    Attributes:
        needs_data: Whether calibration data are needed.
    """

    needs_data: bool = False

    @abc.abstractmethod
    def measure(self, view: GroupView) -> tuple[NeuronMeasure, ...]:
        """Returns one measure per source; all supports have the same number of columns."""
