"""Refits recurrent layers, one layer and direction after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ot import RepairContext, RepairSource
from mergeot_repair.maps import LinearMap, named_arguments, operation_of
from mergeot_repair.recurrent import Cell, States, cells_of, regressions
from mergeot_repair.regression import Sums
from mergeot_repair.running import StagedRun


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
        state: Of the fused model; it is changed.
        runs: The fused model on each batch.
        source_runs: Each source on each batch.
    """

    def __init__(
        self,
        context: RepairContext,
        state: dict[str, Tensor],
        runs: Sequence[StagedRun],
        source_runs: Sequence[Sequence[StagedRun]],
    ) -> None:
        self.context, self.state, self.runs, self.source_runs = context, state, runs, source_runs

    def fit(self, one: LinearMap) -> None:
        """Fits the input and hidden maps of every layer and direction."""
        node = self.runs[0].nodes[one.node]
        arguments = named_arguments(node)
        kind = operation_of(node).removeprefix("aten.")
        layers = cells_of(kind, one.parameters, arguments["num_layers"], bool(arguments["bidirectional"]))
        if not layers or "batch_sizes" in arguments:
            return
        batches = [self._read(one, number, bool(arguments["batch_first"])) for number in range(len(self.runs))]
        place = 0
        for directions in layers:
            for offset, cell in enumerate(directions):
                self._fit_cell(cell, batches, place + offset)
            for batch in batches:
                self._advance(directions, batch, place)
            place += len(directions)
        for run in (*self.runs, *(run for runs in self.source_runs for run in runs)):
            run.settle()

    def _read(self, one: LinearMap, number: int, is_batch_first: bool) -> _Batch:
        """Returns what the operation reads on a batch, in the fused model and in every source."""
        inputs, starts = [], []
        for run in (self.runs[number], *(runs[number] for runs in self.source_runs)):
            held = named_arguments(run.nodes[one.node])["hx"]
            nodes = list(held) if isinstance(held, list | tuple) else [held]
            values = run.values_of([one.source, *(node.name for node in nodes)])
            value = values[one.source]
            # Without a batch, the steps come first and the states have no batch either.
            if value.ndim == 2:
                inputs.append(value[None])
                starts.append([values[node.name][:, None] for node in nodes])
            else:
                inputs.append(value if is_batch_first else value.transpose(0, 1))
                starts.append([values[node.name] for node in nodes])
        return _Batch(inputs[0], inputs[1:], starts)

    def _fit_cell(self, cell: Cell, batches: Sequence[_Batch], place: int) -> None:
        weights = cell.tensors(self.state)
        hidden = weights[1].shape[1]
        maps = list(regressions(cell, hidden))
        has_bias = len(cell.names) > 2
        sums: list[Sums | None] = [None] * len(maps)
        for batch in batches:
            before, made = self._targets(cell, batch, place)
            for index, (rows, reads_input, reads_hidden) in enumerate(maps):
                read = torch.cat([batch.fused] * reads_input + [before] * reads_hidden, 2).flatten(0, 1)
                wanted = [made[0][..., rows]] * reads_input + [made[1][..., rows]] * reads_hidden
                target = torch.stack(wanted).sum(0).flatten(0, 1)
                found = sums[index] or Sums(read.shape[1], target.shape[1])
                found.add(read, target)
                sums[index] = found
        for (rows, reads_input, reads_hidden), found in zip(maps, sums, strict=True):
            if found is not None:
                self._write(cell, found, rows, reads_input, reads_hidden, has_bias)

    def _targets(self, cell: Cell, batch: _Batch, place: int) -> tuple[States, tuple[States, States]]:
        """Returns the mean hidden state each step reads, and the mean of what the input and the hidden map make."""
        read, made = [], ([], [])
        for number, (source, share) in enumerate(zip(self.context.sources, self.context.model_weights, strict=True)):
            if share == 0:
                continue
            inputs, start = batch.sources[number], [value[place] for value in batch.starts[1 + number]]
            tensors = cell.tensors(dict(source.state))
            states = cell.before(cell.states(tensors, inputs, start), start)
            read.append(share * _hidden_in_order(source, cell, states))
            for parts, part in zip(made, cell.parts(tensors, inputs, states), strict=True):
                parts.append(share * source.in_fused_order(part, 2, cell.names[0]))
        return torch.stack(read).sum(0), (torch.stack(made[0]).sum(0), torch.stack(made[1]).sum(0))

    def _write(
        self, cell: Cell, sums: Sums, rows: slice, reads_input: bool, reads_hidden: bool, has_bias: bool
    ) -> None:
        names = [name for name, is_read in zip(cell.names[:2], (reads_input, reads_hidden), strict=True) if is_read]
        start = torch.cat([self.state[name][rows] for name in names], 1)
        solution = sums.solve(start, has_bias)
        sizes = [self.state[name].shape[1] for name in names]
        for name, weight in zip(names, solution.weight.split(sizes, 1), strict=True):
            self.state[name][rows] = weight.to(self.state[name].dtype)
        if has_bias:
            biases = [n for n, is_read in zip(cell.names[2:], (reads_input, reads_hidden), strict=True) if is_read]
            # Where both maps are read their biases add up: the first holds the sum.
            for number, name in enumerate(biases):
                self.state[name][rows] = solution.shift.to(self.state[name].dtype) if number == 0 else 0.0

    def _advance(self, directions: Sequence[Cell], batch: _Batch, place: int) -> None:
        """Takes a batch through a layer: the fused model with its new maps, and every source."""
        models = [
            (self.state, batch.fused),
            *((dict(s.state), x) for s, x in zip(self.context.sources, batch.sources, strict=True)),
        ]
        results = []
        for (state, inputs), starts in zip(models, batch.starts, strict=True):
            outputs = [
                cell.states(cell.tensors(state), inputs, [value[place + offset] for value in starts])
                for offset, cell in enumerate(directions)
            ]
            results.append(torch.cat(outputs, 2))
        batch.fused, batch.sources = results[0], results[1:]


def _hidden_in_order(source: RepairSource, cell: Cell, states: States) -> States:
    """Returns hidden states in fused order: they move, and change sign, as the rows of the odd gate do."""
    rows = source.in_fused_order(states.repeat(1, 1, cell.gates), 2, cell.names[0])
    size = rows.shape[2] // cell.gates
    return rows[..., cell.odd_gate * size : (cell.odd_gate + 1) * size]
