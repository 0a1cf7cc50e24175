"""Runs what stands between the maps that read a stream and the one that writes it, on results given for the readers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergekit_ot import RepairContext, RepairSource
from mergeot_repair.programs.running import HeldBytes, StagedRun
from mergeot_repair.streams.branches import Branch, Rows
from mergeot_repair.streams.reading import Map

# What rounding in single precision may change, relative to the largest number.
_TOLERANCE = 1e-4


class Between:
    """A branch of a source, run on what the fused network reads.

    Args:
        branch: The branch.
        source: The source.
        maps: Reader → its rows on what the fused network reads.
    """

    def __init__(self, branch: Branch, source: RepairSource, maps: Mapping[str, Map]) -> None:
        self.branch, self.source, self.maps = branch, source, maps
        graph = source.alignment.graphs[source.number]
        self.rows: dict[str, Rows] = {reader.weight: branch.rows(graph, reader) for reader in branch.readers}
        self.columns = branch.columns(graph)

    @property
    def units(self) -> int:
        """How many heads or neurons there are."""
        return len(self.columns)

    def value_rows(self) -> Float[Tensor, "head value number"]:
        """Returns the rows that make the values of the source's own heads."""
        weight = self.branch.value_reader.weight
        return self.maps[weight].weight[self.rows[weight].values]

    def neurons(self, inputs: tuple[Tensor, ...], read: Mapping[str, Tensor]) -> Float[Tensor, "place neuron"]:
        """Returns what the neurons hold.

        Args:
            inputs: The batch.
            read: Operation → what the fused network reads there.
        """
        return self._run(inputs, self._results(read))[:, self.columns[:, 0]]

    def patterns(
        self, inputs: tuple[Tensor, ...], read: Mapping[str, Tensor], basis: Float[Tensor, "number fused"]
    ) -> Float[Tensor, "place head query number"]:
        """Returns what each head's attention mixes of what the fused network reads where values are made.

        Attention is linear in its values, and mixes each of a head's alike: values are given numbers of what is read,
        as many at a time as a head has values.

        Args:
            inputs: The batch.
            read: Operation → what the fused network reads there.
            basis: Which combinations of these numbers are mixed.
        """
        reader = self.branch.value_reader
        results = self._results(read)
        index = self.rows[reader.weight].values
        width = index.shape[1]
        numbers = read[reader.source] @ basis.T.to(read[reader.source].dtype)
        chunks = []
        for chunk in numbers.split(width, -1):
            given = {**results, reader.output: with_values(results[reader.output], index, chunk)}
            mixed = self._run(inputs, given)[:, self.columns].unflatten(-1, (-1, width))
            chunks.append(mixed[..., : chunk.shape[-1]])
        return torch.cat(chunks, -1)

    def _results(self, read: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns what the source's readers make of what the fused network reads."""
        results = {}
        for reader in self.branch.readers:
            linear, value = self.maps[reader.weight], read[reader.source]
            results[reader.output] = value @ linear.weight.T.to(value.dtype) + linear.shift.to(value.dtype)
        return results

    def _run(self, inputs: tuple[Tensor, ...], results: Mapping[str, Tensor]) -> Float[Tensor, "place column"]:
        run = StagedRun(self.source.program, self.source.state, inputs, HeldBytes())
        return _result_of(run, self.branch, results)


def with_values(result: Tensor, index: Int[Tensor, "head value"], numbers: Tensor) -> Tensor:
    """Returns what a reader makes with the same numbers as values of every head, and zeros for values that are left.

    Args:
        result: What the reader makes.
        index: Where the values of each head stand in it.
        numbers: At most as many per place as a head has values.
    """
    changed = result.clone()
    changed[..., index] = 0
    given = index[:, : numbers.shape[-1]]
    changed[..., given] = numbers[..., None, :].expand(*numbers.shape[:-1], *given.shape).to(changed.dtype)
    return changed


def mixes_values(branch: Branch, context: RepairContext) -> bool:
    """Whether a branch is attention: linear in its values, each mixed by its own head's pattern alone."""
    graph = context.sources[0].alignment.target
    reader = branch.value_reader
    index, columns = branch.rows(graph, reader).values, branch.columns(graph)
    heads, width = index.shape
    inputs = next(iter(context.batches))
    nodes = {node.name: node for node in context.program.graph.nodes}
    generator = torch.Generator().manual_seed(0)
    results = {
        other.output: torch.randn(nodes[other.output].meta["val"].shape, generator=generator)
        for other in branch.readers
    }
    numbers = torch.randn(2, *results[reader.output].shape[:-1], 1, generator=generator)

    def mixed(values: Tensor) -> Tensor:
        run = StagedRun(context.program, context.fused, inputs, HeldBytes())
        rows = _result_of(run, branch, {**results, reader.output: values})
        return rows[:, columns].unflatten(-1, (-1, width))

    base = results[reader.output]
    sides = [mixed(with_values(base, index, number.expand(*number.shape[:-1], width))) for number in numbers]
    total = mixed(with_values(base, index, numbers.sum(0).expand(*numbers.shape[1:-1], width)))
    alone = with_values(base, index, torch.zeros_like(numbers[0]))
    alone[..., index[0, :1]] = numbers[0]
    apart = mixed(alone)
    wanted = torch.zeros_like(apart)
    wanted[:, 0, :, 0] = sides[0][:, 0, :, 0]
    spread = sides[0] - sides[0][..., :1]
    size = _TOLERANCE * float(total.abs().max())
    errors = (total - sides[0] - sides[1], apart - wanted, spread)
    return heads > 0 and all(float(error.abs().max()) <= size for error in errors)


def _result_of(run: StagedRun, branch: Branch, results: Mapping[str, Tensor]) -> Float[Tensor, "place column"]:
    """Returns what the writer of a branch reads where its readers make these results."""
    for name, value in results.items():
        run.values[run.nodes[name]] = value
    end = branch.writer.source
    value = results[end] if end in results else run.values_of([end])[end]
    return value.flatten(0, -2)
