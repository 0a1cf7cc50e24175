"""Runs what stands between the maps that read a stream and the one that writes it, on results given for the readers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot import RepairSource
from mergeot_repair.programs.running import HeldBytes, StagedRun
from mergeot_repair.streams.branches import Branch, rows_of_units
from mergeot_repair.streams.reading import Map


class Between:
    """A branch of one source, run on what the fused network reads.

    Args:
        branch: The branch.
        source: The source.
        maps: Reader → its rows on what the fused network reads.
    """

    def __init__(self, branch: Branch, source: RepairSource, maps: Mapping[str, Map]) -> None:
        self.branch, self.source, self.maps = branch, source, maps
        graph = source.alignment.graphs[source.number]
        self.graph = graph
        self.readers = {
            reader.weight: rows_of_units(graph.layouts[reader.weight][0], branch.group, branch.values)
            for reader in branch.readers
        }
        columns = rows_of_units(graph.layouts[branch.writer.weight][1], branch.group, branch.values)
        assert columns is not None
        self.columns = columns.patterns if branch.values is None else columns.values

    @property
    def units(self) -> int:
        """How many heads or neurons there are."""
        return len(self.columns)

    def made(self, inputs: tuple[Tensor, ...], read: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns what the readers make of what the fused network reads."""
        results = {}
        for reader in self.branch.readers:
            linear = self.maps[reader.weight]
            value = read[reader.source]
            results[reader.output] = value @ linear.weight.T.to(value.dtype) + linear.shift.to(value.dtype)
        return results

    def run(self, inputs: tuple[Tensor, ...], made: Mapping[str, Tensor]) -> Float[Tensor, "place column"]:
        """Returns what the writer reads where the readers make this."""
        run = StagedRun(self.source.program, self.source.state, inputs, HeldBytes())
        for name, value in made.items():
            run.values[run.nodes[name]] = value
        end = self.branch.writer.source
        value = made[end] if end in made else run.values_of([end])[end]
        return value.flatten(0, -2)

    def value_rows(self) -> Float[Tensor, "head value number"]:
        """Returns the rows that make the values of the source's own heads."""
        weight = next(r.weight for r in self.branch.readers if self._values_of(r.weight).shape[1])
        return self.maps[weight].weight[self._values_of(weight)]

    def neurons(self, inputs: tuple[Tensor, ...], read: Mapping[str, Tensor]) -> Float[Tensor, "place neuron"]:
        """Returns what the neurons hold."""
        return self.run(inputs, self.made(inputs, read))[:, self.columns[:, 0]]

    def patterns(
        self, inputs: tuple[Tensor, ...], read: Mapping[str, Tensor]
    ) -> Float[Tensor, "place head query number"]:
        """Returns what each head's attention mixes of the numbers that the fused network reads where values are made."""
        made = self.made(inputs, read)
        reader = next(r for r in self.branch.readers if self._values_of(r.weight).shape[1])
        index = self._values_of(reader.weight)
        width = index.shape[1]
        numbers = read[reader.source]
        chunks = []
        for start in range(0, numbers.shape[-1], width):
            chunk = numbers[..., start : start + width]
            value = made[reader.output].clone()
            value[..., index] = 0
            value[..., index[:, : chunk.shape[-1]]] = chunk[..., None, :].expand(*chunk.shape[:-1], *index[:, : chunk.shape[-1]].shape)
            mixed = self.run(inputs, {**made, reader.output: value})[:, self.columns]
            chunks.append(mixed.unflatten(-1, (-1, width))[..., : chunk.shape[-1]])
        return torch.cat(chunks, -1)

    def _values_of(self, weight: str) -> Tensor:
        rows = self.readers[weight]
        assert rows is not None
        return rows.values


def check_patterns(run: Callable[[Tensor], Tensor]) -> bool:
    """Whether what a function makes is linear."""
    first, second = torch.randn(2), torch.randn(2)
    return bool(torch.allclose(run(first) + run(second), run(first + second)))
