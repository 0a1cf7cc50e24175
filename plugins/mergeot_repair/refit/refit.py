"""Refits the linear maps of a fused model to what the aligned sources compute: no labels, no gradients, one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot import AbstractRepair, RepairContext, named_arguments
from mergeot_repair.control import check_control
from mergeot_repair.programs.maps import RECURRENT, LinearMap, MapFinder, taken_back
from mergeot_repair.programs.running import HeldBytes, StagedRun
from mergeot_repair.refit.pruning import PULL, PULL_OF_STATES, Products
from mergeot_repair.refit.recurrent_refit import RecurrentRefit
from mergeot_repair.refit.regression import Sums, joined
from mergeot_repair.refit.samples import regression_rows, rows_of, weight_of
from mergeot_repair.refit.selection import Selection

# Places of an image are samples that resemble each other: so many per input of a map say as much as all of them.
_SAMPLES_PER_INPUT = 60
_LEAST_SAMPLES = 20_000
_CHOICE_SAMPLES_PER_INPUT = 4


class RefitRepair(AbstractRepair):
    """Fits each linear map, in order, to what the sources compute there.

    Neurons that are made and read by linear maps and recurrent cells alone are taken from the sources, chosen by
    what their readers need (see `mergeot_repair.refit.selection`); all others follow the couplings and are fitted to
    the mean of the aligned sources. The results of the model are always fitted to the mean of the sources' results.

    The inputs of a regression are the fused model's own, so a map also makes up for what the maps before it lack. It is
    pulled towards the weights that the sources have there, by as much as cross-validation asks for. A BatchNorm behind
    a map is fitted together with it. Where the result is added to a stream, the map is fitted to the stream that the
    sources have in the mean, less what the fused model adds it to.

    Recurrent layers are fitted gate by gate on their input and on hidden states of the sources, never on own ones.
    Weights that stand in several places of the model, transposed convolutions with groups and projected LSTMs stay
    as they are.
    """

    needs_data = True

    def repair(self, context: RepairContext) -> dict[str, Tensor]:
        """Returns the fused state with new linear maps.

        Raises:
            DataError: The procedure changes an untouched source, which is its control.
        """
        check_control(context, "refit", lambda control: _Refit(control).run())
        return _Refit(context).run()


class _Refit:
    """One pass over the maps of a fused model."""

    def __init__(self, context: RepairContext) -> None:
        self.context = context
        self.state = {name: value.detach().clone() for name, value in context.fused.items()}
        batches, room = list(context.batches), HeldBytes()
        self.nodes = {node.name: node for node in context.program.graph.nodes}
        self.runs = [StagedRun(context.program, self.state, inputs, room) for inputs in batches]
        self.source_runs = [
            [StagedRun(source.program, source.state, inputs, room) for inputs in batches] for source in context.sources
        ]
        self.generator = torch.Generator().manual_seed(0)
        self.waiting: set[str] = set()
        self.maps = MapFinder(context.program).find()
        self.used = [number for number, share in enumerate(context.model_weights) if share > 0]
        self.selection = Selection(context, self.maps, self.used)
        self.recurrent = {
            one.node: RecurrentRefit(context, one, self.source_runs, self.selection)
            for one in self.maps
            if one.kind == RECURRENT
        }

    def run(self) -> dict[str, Tensor]:
        """Fits every map and returns the new state."""
        maps = self.maps
        if self.selection.groups:
            self.selection.choose(self._products())
            if self.context.note is not None:
                self.context.note(self.selection.described())
        self.waiting = {one.node for one in maps}
        for number, one in enumerate(maps, start=1):
            if one.kind == RECURRENT:
                self.recurrent[one.node].fit(self.state, self.runs)
            else:
                self._fit(one)
            self.waiting.discard(one.node)
            if self.context.progress is not None:
                self.context.progress(number, len(maps), f"refit {one.weight}")
        return self.state

    def _products(self) -> dict[str, Products]:
        """Returns what every reader takes and makes in the sources, in one pass over the data."""
        readers = self.selection.readers
        pull = PULL_OF_STATES if any(one.is_recurrent for one in readers) else PULL
        products = {one.name: Products(one.has_shift, pull) for one in readers}
        for number in range(len(self.runs)):
            # In the order of the program, so that nothing runs twice.
            for one in self.maps:
                if one.kind == RECURRENT:
                    self.recurrent[one.node].add_products(number, products)
                elif one.weight in products:
                    self._add_products(one, number, products[one.weight])
            for source in self.used:
                self.source_runs[source][number].release()
            if self.context.progress is not None:
                self.context.progress(number + 1, len(self.runs), "refit: reading batches")
        return products

    def _add_products(self, one: LinearMap, number: int, products: Products) -> None:
        pairs = []
        for source in self.used:
            run, state = self.source_runs[source][number], self.context.sources[source].state
            values = run.values_of([one.source, one.output])
            pairs.append(self._samples(one, values[one.source], values[one.output], state[one.weight]))
        inputs, outputs = (torch.cat(parts, 1) for parts in zip(*pairs, strict=True))
        rows = self._chosen_rows(len(inputs), inputs.shape[1], _CHOICE_SAMPLES_PER_INPUT)
        products.add(inputs[rows], outputs[rows])

    def _own_rows(self, one: LinearMap, number: int) -> Float[Tensor, "outputs inputs"]:
        """Returns the rows of a source's neurons, in its order, reading neurons in fused order."""
        source, state = self.context.sources[number], self.context.aligned[number]
        places = source.in_fused_order(torch.eye(len(source.state[one.weight])), 1, one.weight)
        nearest = places.abs().argmax(1)
        return _combined(one, state)[nearest] * places.gather(1, nearest[:, None]).sign()

    def _fit(self, one: LinearMap) -> None:
        weight = self.state[one.weight]
        outputs, inputs = rows_of(one, weight).shape
        sums = [Sums(inputs, outputs // one.groups) for _ in range(one.groups)]
        other = one.added[1] if one.added is not None and self._is_ready(one.added[1]) else None
        for number, run in enumerate(self.runs):
            values = run.values_of([one.source, *([other] if other is not None else [])])
            target = self._target(one, number, other)
            if other is not None:
                target = target - taken_back(values[other], [self.nodes[name] for name in one.path])
            read, goals = self._samples(one, values[one.source], target, weight)
            rows = self._chosen_rows(len(read), inputs, _SAMPLES_PER_INPUT)
            parts = zip(sums, read[rows].chunk(one.groups, 1), goals[rows].chunk(one.groups, 1), strict=True)
            for part, of_group, goals_of_group in parts:
                part.add(of_group, goals_of_group)
            run.settle()
        self._write(one, sums)

    def _is_ready(self, name: str) -> bool:
        """Whether every map that a value depends on was fitted already."""
        found: set[str] = set()
        waiting = [self.nodes[name]]
        while waiting:
            node = waiting.pop()
            if node.name not in found:
                found.add(node.name)
                waiting += node.all_input_nodes
        return not found & self.waiting

    def _target(self, one: LinearMap, number: int, other: str | None) -> Tensor:
        """Returns what the map is to make, or the stream that it is added to."""
        axis, parts = one.values_axis, []
        for source in self.used:
            run = self.source_runs[source][number]
            values = run.values_of([one.output, *([other] if other is not None else [])])
            made = values[one.output]
            if other is not None:
                made = made + taken_back(values[other], [run.nodes[name] for name in one.path])
            parts.append(made)
            run.settle()
        rows = self.selection.rows(one.weight)
        if rows is not None:
            return torch.cat(parts, axis).index_select(axis, rows)
        parts = [
            self.context.model_weights[source]
            * self.context.sources[source].in_fused_order(made, axis, one.weight, one.output_axis)
            for source, made in zip(self.used, parts, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def _samples(
        self, one: LinearMap, values: Tensor, targets: Tensor, weight: Tensor
    ) -> tuple[Float[Tensor, "samples inputs"], Float[Tensor, "samples outputs"]]:
        return regression_rows(one, weight, named_arguments(self.nodes[one.node]), values, targets)

    def _chosen_rows(self, count: int, inputs: int, per_input: int) -> Tensor:
        most = max(_LEAST_SAMPLES, per_input * inputs) // len(self.runs)
        return torch.randperm(count, generator=self.generator)[:most]

    def _write(self, one: LinearMap, sums: Sequence[Sums]) -> None:
        state, weight = self.state, self.state[one.weight]
        start = self.selection.start(one.weight, lambda number: self._own_rows(one, number))
        starts = (_combined(one, state) if start is None else start).chunk(one.groups)
        parts = [part.solve(rows, one.has_shift) for part, rows in zip(sums, starts, strict=True)]
        solution = joined(parts)
        if one.norm is None:
            state[one.weight] = weight_of(one, solution.weight, weight)
            if one.bias is not None:
                state[one.bias] = solution.shift.to(weight.dtype)
            return
        scale, shift, mean, variance = one.norm
        # The BatchNorm keeps the statistics of what it reads, so that training can go on from here.
        found = {variance: solution.variance, mean: solution.mean - solution.shift}
        found[one.weight] = weight_of(one, solution.weight, weight)
        if scale is not None:
            found[scale] = (solution.variance + one.epsilon).sqrt()
        else:
            found[variance] = torch.full_like(solution.variance, 1 - one.epsilon)
        if shift is not None:
            found[shift] = solution.mean
        else:
            found[mean] = torch.zeros_like(solution.mean)
        if one.bias is not None:
            found[one.bias] = torch.zeros_like(state[one.bias])
        for name, value in found.items():
            state[name] = value.to(state[name].dtype)


def _combined(one: LinearMap, state: Mapping[str, Tensor]) -> Float[Tensor, "outputs inputs"]:
    """Returns the rows of a map together with the BatchNorm behind it."""
    rows = rows_of(one, state[one.weight])
    if one.norm is None:
        return rows
    scale, _, _, variance = one.norm
    factor = (state[variance] + one.epsilon).rsqrt()
    return rows * (factor if scale is None else state[scale] * factor)[:, None]
