"""Fits a branch of a stream: chooses its heads or neurons, and writes the maps that read for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergeot_repair.refit.pruning import Products
from mergeot_repair.refit.samples import made_rows, row_count, rows_of
from mergeot_repair.streams.between import Between
from mergeot_repair.streams.branches import Branch
from mergeot_repair.streams.choice import PULL, Values, chosen_units, writer_of_neurons
from mergeot_repair.streams.components import linked
from mergeot_repair.streams.metric import metric_root
from mergeot_repair.streams.reading import Map
from mergeot_repair.streams.workspace import Workspace

# Inputs of a regression beyond which its inverse takes minutes and gigabytes.
MOST_INPUTS = 10_000


class BranchFit:
    """The fit of a branch.

    Args:
        work: The networks.
        branch: The branch.
    """

    def __init__(self, work: Workspace, branch: Branch) -> None:
        self.work, self.branch = work, branch
        maps = {reader.weight: work.reader_maps(reader) for reader in branch.readers}
        self.sides = [
            Between(branch, source, {weight: of_sources[number] for weight, of_sources in maps.items()})
            for number, source in enumerate(work.sources)
        ]
        self.counts = [side.units for side in self.sides]
        self.columns = branch.columns(work.graph)
        self.queries = 1 if branch.values is None else branch.queries(work.graph)
        self.kept: Int[Tensor, " unit"] = torch.arange(sum(self.counts))

    def fit(self) -> Float[Tensor, "outputs inputs"]:
        """Writes the readers, and returns what the fit of the writer starts from."""
        outputs, inputs = rows_of(self.branch.writer, self.work.state[self.branch.writer.weight]).shape
        start = torch.zeros(outputs, inputs, dtype=torch.float64)
        rows = self._own_values()
        if (
            len(self.sides) == 1
            and sum(self.counts) <= len(self.columns)
            and (rows is None) == (not self.branch.values)
        ):
            start[:, self._written()] = self._own_writer()
        else:
            products, basis = self._products()
            root = metric_root(self.work, self.branch.stream, self.branch.writer.node)
            self.kept = chosen_units(products, root, self.counts, len(self.columns))
            if self.branch.values is None:
                begun = writer_of_neurons(products, self.kept, outputs)
            else:
                values = Values(products, root, self.kept, sum(self.counts), self.queries)
                fitted = values.fit(self.columns.shape[1] // self.queries)
                begun, rows = values.writer(fitted), fitted @ basis
            start[:, self._written()] = begun
        for reader in self.branch.readers:
            self._write_reader(reader.weight, rows)
        self._write_parameters()
        return start

    def kept_of_sources(self) -> list[int]:
        """Returns how many units were kept of each source."""
        return torch.bincount(self._owners()[0], minlength=len(self.sides)).tolist()

    def _written(self) -> Int[Tensor, " column"]:
        return self.columns[: len(self.kept)].flatten()

    def _own_values(self) -> Float[Tensor, "head value number"] | None:
        """Returns the rows that make the values of a source's own heads, where there are as many as here."""
        if self.branch.values is None:
            return None
        rows = self.sides[0].value_rows()
        return rows if rows.shape[1] * self.queries == self.columns.shape[1] else None

    def _own_writer(self) -> Float[Tensor, "outputs column"]:
        """Returns the columns of the source's own map."""
        writer = self.branch.writer
        weight = rows_of(writer, self.work.sources[0].state[writer.weight]).double()
        return linked([weight], self.work.links[self.branch.stream.group], 0)[:, self.sides[0].columns.flatten()]

    def _products(self) -> tuple[Products, Float[Tensor, "number fused"]]:
        """Returns the products of what all units hold and of what the writer is to make, and what heads mix."""
        work, branch = self.work, self.branch
        products = Products(branch.writer.has_shift, PULL)
        basis = self._basis()
        for number, run in enumerate(work.runs):
            read = run.values_of({reader.source for reader in branch.readers})
            goals = work.goals(branch.writer, branch.stream, number)
            rows = made_rows(branch.writer, goals, torch.arange(row_count(branch.writer, goals)))
            if branch.values is None:
                held = [side.neurons(work.batches[number], read) for side in self.sides]
            else:
                held = [side.patterns(work.batches[number], read, basis).flatten(1) for side in self.sides]
            products.add_parts(held, [rows])
            work.settle(number)
        return products, basis

    def _basis(self) -> Float[Tensor, "number fused"]:
        """Returns which combinations of what is read heads may mix: all, or principal ones where that is too many."""
        if self.branch.values is None:
            return torch.eye(1, dtype=torch.float64)
        point = self.work.point_of[self.branch.value_reader.node]
        gram = self.work.translation(point).gram()
        most = max(1, MOST_INPUTS // (sum(self.counts) * self.queries))
        if len(gram) <= most:
            return torch.eye(len(gram), dtype=torch.float64)
        return torch.linalg.eigh(gram)[1][:, -most:].T

    def _owners(self) -> tuple[Int[Tensor, " unit"], Int[Tensor, " unit"]]:
        """Returns the source of each kept unit, and its place there."""
        counts = torch.tensor(self.counts)
        owners = torch.repeat_interleave(torch.arange(len(counts)), counts)[self.kept]
        return owners, self.kept - (counts.cumsum(0) - counts)[owners]

    def _write_reader(self, weight: str, values: Float[Tensor, "head rank number"] | None) -> None:
        """Writes a map that reads for the branch: rows of its kept units, and values where heads have new ones."""
        reader = next(reader for reader in self.branch.readers if reader.weight == weight)
        rows = self.branch.rows(self.work.graph, reader)
        fused = torch.zeros(*rows_of(reader, self.work.state[weight]).shape, dtype=torch.float64)
        shift = torch.zeros(len(fused), dtype=torch.float64)
        for unit, (owner, place) in enumerate(_pairs(self._owners())):
            side = self.sides[owner]
            theirs = side.rows[weight].patterns[place]
            fused[rows.patterns[unit]] = side.maps[weight].weight[theirs]
            shift[rows.patterns[unit]] = side.maps[weight].shift[theirs]
            if values is not None and rows.values.shape[1]:
                fused[rows.values[unit]] = values[unit]
        self.work.write(reader, Map(fused, shift))

    def _write_parameters(self) -> None:
        """Writes what else there is per head."""
        for name, axis in self.branch.parameters:
            value = self.work.state[name].clone()
            for unit, (owner, place) in enumerate(_pairs(self._owners())):
                value.select(axis, unit).copy_(self.work.sources[owner].state[name].select(axis, place))
            self.work.set(name, value)


def _pairs(owners: Sequence[Tensor]) -> list[tuple[int, int]]:
    return list(zip(owners[0].tolist(), owners[1].tolist(), strict=True))
