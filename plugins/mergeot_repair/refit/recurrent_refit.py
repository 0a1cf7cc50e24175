"""Refits recurrent layers, one layer and direction after the other."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ot import RepairContext, RepairSource, named_arguments
from mergeot_repair.programs.maps import LinearMap
from mergeot_repair.programs.running import StagedRun
from mergeot_repair.refit.pruning import Products
from mergeot_repair.refit.readings import Reading, readings_of_cell
from mergeot_repair.refit.recurrent import Cell, States, layers_of, regressions
from mergeot_repair.refit.regression import Sums
from mergeot_repair.refit.selection import Selection

# The hidden state that each step reads, and what the input map and the hidden map make.
_Seen = tuple[States, tuple[States, States]]


@dataclass
class _Batch:
    """One batch on its way through the layers: the fused model's input of the next layer, and each source's."""

    fused: States
    sources: list[States]
    starts: list[list[Tensor]]


class RecurrentRefit:
    """Fits the layers of one recurrent operation.

    Args:
        context: Of the repair.
        linear_map: The operation.
        source_runs: Each source on each batch.
        selection: The neurons that are taken from the sources.
    """

    def __init__(
        self,
        context: RepairContext,
        linear_map: LinearMap,
        source_runs: Sequence[Sequence[StagedRun]],
        selection: Selection,
    ) -> None:
        self.context, self.linear_map, self.source_runs, self.selection = context, linear_map, source_runs, selection
        self.node = {node.name: node for node in context.program.graph.nodes}[linear_map.node]
        self.layers = layers_of(linear_map, self.node)

    def fit(self, state: dict[str, Tensor], runs: Sequence[StagedRun]) -> None:
        """Fits the input and hidden maps of every layer and direction.

        Args:
            state: Of the fused model; it is changed.
            runs: The fused model on each batch.
        """
        if not self.layers:
            return
        batches = []
        for number, run in enumerate(runs):
            inputs, starts = self._read([run, *(of_source[number] for of_source in self.source_runs)])
            batches.append(_Batch(inputs[0], inputs[1:], starts))
        place = 0
        for directions in self.layers:
            for offset, cell in enumerate(directions):
                self._fit_cell(cell, state, batches, place + offset)
            for batch in batches:
                self._advance(directions, state, batch, place)
            place += len(directions)
        for of_network in (runs, *self.source_runs):
            for run in of_network:
                run.settle()

    def add_products(self, number: int, products: Mapping[str, Products]) -> None:
        """Adds what the cells whose neurons are to be chosen read and make in the sources on a batch."""
        cells = itertools.chain.from_iterable(self.layers)
        if not any(self._has_products(cell, products) for cell in cells):
            return
        inputs, starts = self._read([of_source[number] for of_source in self.source_runs])
        place = 0
        for directions in self.layers:
            for offset, cell in enumerate(directions):
                own = [_of_cell(start, place + offset) for start in starts]
                self._add_cell(cell, inputs, own, products)
            inputs = [
                self._states(directions, dict(source.state), value, start, place)
                for source, value, start in zip(self.context.sources, inputs, starts, strict=True)
            ]
            place += len(directions)

    def _readings(self, cell: Cell) -> list[Reading]:
        return readings_of_cell(cell, self.context.fused[cell.names[1]].shape[1])

    def _has_products(self, cell: Cell, products: Mapping[str, Products]) -> bool:
        return any(reading.name in products for reading in self._readings(cell))

    def _add_cell(
        self, cell: Cell, inputs: Sequence[States], starts: Sequence[list[Tensor]], products: Mapping[str, Products]
    ) -> None:
        seen = [self._seen(cell, number, inputs[number], starts[number]) for number in self.selection.used]
        for index, reading in enumerate(self._readings(cell)):
            if reading.name not in products:
                continue
            read, made = self._fixed(cell, reading, inputs), []
            for (before, parts), number in zip(seen, self.selection.used, strict=True):
                held = {cell.names[0]: inputs[number], cell.names[1]: before}
                read += [held[weight] for weight in reading.weights if self.selection.reads_chosen(weight)]
                made.append(_of_map(cell, index, parts))
            products[reading.name].add(torch.cat(read, 2).flatten(0, 1), torch.cat(made, 2).flatten(0, 1))

    def _fixed(self, cell: Cell, reading: Reading, inputs: Sequence[States]) -> list[States]:
        """Returns the mean of what the sources' cells read, where it is not of neurons to be chosen."""
        weight = cell.names[0]
        if weight not in reading.weights or self.selection.reads_chosen(weight):
            return []
        means = [
            self.context.model_weights[number]
            * self.context.sources[number].in_fused_order(inputs[number], 2, weight, 1)
            for number in self.selection.used
        ]
        return [torch.stack(means).sum(0)]

    def _seen(self, cell: Cell, number: int, inputs: States, start: Sequence[Tensor]) -> _Seen:
        """Returns the hidden state that each step of a source reads, and what its two maps make."""
        tensors = cell.tensors(dict(self.context.sources[number].state))
        before = cell.before(cell.states(tensors, inputs, start), start)
        return before, cell.parts(tensors, inputs, before)

    def _read(self, runs: Sequence[StagedRun]) -> tuple[list[States], list[list[Tensor]]]:
        """Returns what the operation reads on a batch: the steps, batch first, and the initial states."""
        inputs, starts = [], []
        is_batch_first = bool(named_arguments(self.node)["batch_first"])
        for run in runs:
            held = named_arguments(run.nodes[self.linear_map.node])["hx"]
            nodes = list(held) if isinstance(held, list | tuple) else [held]
            values = run.values_of([self.linear_map.source, *(node.name for node in nodes)])
            value = values[self.linear_map.source]
            # Without a batch, the steps come first and the states have no batch either.
            if value.ndim == 2:
                inputs.append(value[None])
                starts.append([values[node.name][:, None] for node in nodes])
            else:
                inputs.append(value if is_batch_first else value.transpose(0, 1))
                starts.append([values[node.name] for node in nodes])
        return inputs, starts

    def _fit_cell(self, cell: Cell, state: dict[str, Tensor], batches: Sequence[_Batch], place: int) -> None:
        weights = cell.tensors(state)
        maps = list(regressions(cell, weights[1].shape[1]))
        sums: list[Sums | None] = [None] * len(maps)
        for batch in batches:
            before, targets = self._targets(cell, batch, place)
            for index, (_, reads_input, reads_hidden) in enumerate(maps):
                read = torch.cat([batch.fused] * reads_input + [before] * reads_hidden, 2).flatten(0, 1)
                target = targets[index].flatten(0, 1)
                of_map = sums[index] or Sums(read.shape[1], target.shape[1])
                of_map.add(read, target)
                sums[index] = of_map
        for index, (of_map, reading) in enumerate(zip(sums, self._readings(cell), strict=True)):
            if of_map is not None:
                _write(cell, state, of_map, maps[index], self.selection.start(reading.name))

    def _targets(self, cell: Cell, batch: _Batch, place: int) -> tuple[States, list[States]]:
        """Returns the hidden state each step is to read, and what each regression is to make.

        Of the chosen neurons, or the means of the aligned ones.
        """
        seen = [
            self._seen(cell, number, batch.sources[number], _of_cell(batch.starts[1 + number], place))
            for number in self.selection.used
        ]
        readings = self._readings(cell)
        chosen = [rows for reading in readings if (rows := self.selection.rows(reading.name)) is not None]
        if len(chosen) < len(readings):
            return self._means(cell, seen)
        states = torch.cat([before for before, _ in seen], 2)[..., self.selection.states(readings[0].name)]
        goals = []
        for index, rows in enumerate(chosen):
            of_sources = [_of_map(cell, index, parts) for _, parts in seen]
            goals.append(torch.cat(of_sources, 2)[..., rows])
        return states, goals

    def _means(self, cell: Cell, seen: Sequence[_Seen]) -> tuple[States, list[States]]:
        """Returns the mean hidden state that each step reads, and the means of what each regression is to make."""
        sources = [self.context.sources[number] for number in self.selection.used]
        shares = [self.context.model_weights[number] for number in self.selection.used]
        used = list(zip(sources, shares, seen, strict=True))
        states = [share * _hidden_in_order(source, cell, before) for source, share, (before, _) in used]
        means = []
        for rows, reads_input, reads_hidden in regressions(cell, states[0].shape[2]):
            goals = [
                share * source.in_fused_order(parts[0] * reads_input + parts[1] * reads_hidden, 2, cell.names[0])
                for source, share, (_, parts) in used
            ]
            means.append(torch.stack(goals).sum(0)[..., rows])
        return torch.stack(states).sum(0), means

    def _advance(self, directions: Sequence[Cell], state: dict[str, Tensor], batch: _Batch, place: int) -> None:
        """Takes a batch through a layer: the fused model with its new maps, and every source."""
        models = [
            (state, batch.fused),
            *((dict(s.state), x) for s, x in zip(self.context.sources, batch.sources, strict=True)),
        ]
        results = [
            self._states(directions, own, inputs, starts, place)
            for (own, inputs), starts in zip(models, batch.starts, strict=True)
        ]
        batch.fused, batch.sources = results[0], results[1:]

    def _states(
        self, directions: Sequence[Cell], state: dict[str, Tensor], inputs: States, starts: Sequence[Tensor], place: int
    ) -> States:
        """Returns what a layer makes of its inputs, its directions side by side."""
        outputs = [
            cell.states(cell.tensors(state), inputs, _of_cell(starts, place + offset))
            for offset, cell in enumerate(directions)
        ]
        return torch.cat(outputs, 2)


def _of_cell(starts: Sequence[Tensor], place: int) -> list[Tensor]:
    """Returns the initial states of one layer and direction."""
    return [start[place] for start in starts]


def _of_map(cell: Cell, index: int, maps: tuple[States, States]) -> States:
    """Returns what one of a cell's regressions is to make, out of what its input and its hidden map make."""
    rows, reads_input, reads_hidden = list(regressions(cell, maps[0].shape[2] // cell.gates))[index]
    return sum((part[..., rows] for part, is_read in zip(maps, (reads_input, reads_hidden), strict=True) if is_read))  # type: ignore[return-value]


def _write(
    cell: Cell, state: dict[str, Tensor], sums: Sums, block: tuple[slice, bool, bool], start: Tensor | None
) -> None:
    """Solves a regression and writes it into the cell's parameters.

    Args:
        cell: The cell.
        state: Of the fused model; it is changed.
        sums: The regression's.
        block: Its rows, whether they read the input, and whether they read the hidden state.
        start: The weights towards which it is pulled; those in force where None.
    """
    rows, *is_read = block
    names = list(itertools.compress(cell.names[:2], is_read))
    biases = list(itertools.compress(cell.names[2:], is_read))
    if start is None:
        start = torch.cat([state[name][rows] for name in names], 1)
    solution = sums.solve(start, bool(biases))
    sizes = [state[name].shape[1] for name in names]
    for name, weight in zip(names, solution.weight.split(sizes, 1), strict=True):
        state[name][rows] = weight.to(state[name].dtype)
    # Where both maps are read their biases add up: the first holds the sum.
    for number, name in enumerate(biases):
        state[name][rows] = solution.shift.to(state[name].dtype) if number == 0 else 0.0


def _hidden_in_order(source: RepairSource, cell: Cell, states: States) -> States:
    """Returns hidden states in fused order: they move, and change sign, as the rows of the odd gate do."""
    rows = source.in_fused_order(states.repeat(1, 1, cell.gates), 2, cell.names[0])
    size = rows.shape[2] // cell.gates
    return rows[..., cell.odd_gate * size : (cell.odd_gate + 1) * size]
