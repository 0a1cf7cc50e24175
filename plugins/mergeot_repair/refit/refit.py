"""Refits the linear maps of a fused model to what the aligned sources compute: no labels, no gradients, one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergekit_ot import AbstractRepair, RepairContext, named_arguments
from mergeot_repair.control import SHIFTED, check_control, check_statistics
from mergeot_repair.programs.maps import RECURRENT, LinearMap, Norm, free_maps
from mergeot_repair.programs.running import HeldBytes, staged_runs
from mergeot_repair.refit.pieces import in_pieces
from mergeot_repair.refit.pruning import PULL, PULL_OF_STATES, Products
from mergeot_repair.refit.recurrent_refit import RecurrentRefit
from mergeot_repair.refit.regression import Solution, Sums, joined
from mergeot_repair.refit.samples import made_rows, read_rows, rows_of, weight_of
from mergeot_repair.refit.selection import Selection
from mergeot_repair.refit.targets import Target, Targets, taken_back_through
from mergeot_repair.streams.finding import Stream, StreamFinder
from mergeot_repair.streams.refit import StreamRefit

# The control fits what a network makes to itself: a share of the samples shows whether that changes it.
_CONTROL_SHARE = 10


class RefitRepair(AbstractRepair):
    """Fits each linear map, in order, to what the sources compute there.

    Neurons that are made and read by linear maps and recurrent cells alone are taken from the sources, chosen by
    what their readers need (see `mergeot_repair.refit.selection`); all others follow the couplings and are fitted to
    the mean of the aligned sources. The results of the model are always fitted to the mean of the sources' results.

    A residual stream that linear maps read behind norms alone, as in transformers, becomes the principal components of
    the sources' streams side by side; the heads and neurons between are chosen among the sources' (see
    `mergeot_repair.streams`).

    The inputs of a regression are the fused model's own, so a map also makes up for what the maps before it lack. It is
    pulled towards the weights that the sources have there, by as much as suits samples that were held out. A BatchNorm
    behind a map is fitted together with it. Where the result is added to a stream, the map is fitted to the stream that
    the sources have in the mean, less what the fused model adds it to.

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
        with in_pieces():
            check_statistics(context, "refit", least_shift=SHIFTED)
            streams = StreamFinder(context, free_maps(context)).find()
            check_control(context, "refit", lambda control: _Refit(control, streams, _CONTROL_SHARE).run())
            return _Refit(context, streams).run()


class _Refit:
    """One pass over the maps of a fused model.

    Args:
        context: Of the repair.
        streams: The residual streams behind norms of the fused model.
        share: One in so many of the samples that a fit takes is taken.
    """

    def __init__(self, context: RepairContext, streams: Sequence[Stream] = (), share: int = 1) -> None:
        self.context = context
        self.state = {name: value.detach().clone() for name, value in context.fused.items()}
        batches, room = list(context.batches), HeldBytes()
        self.nodes = {node.name: node for node in context.program.graph.nodes}
        self.runs = staged_runs(context.program, self.state, batches, room)
        source_runs = [staged_runs(source.program, source.state, batches, room) for source in context.sources]
        self.maps = free_maps(context)
        self.used = [number for number, share in enumerate(context.model_weights) if share > 0]
        self.source_runs = [source_runs[number] for number in self.used]
        self.targets = Targets(context, self.maps, self.source_runs, room, share)
        self.streams = StreamRefit(context, streams, self.used, self.state, self.targets.streams)
        self.batches = batches
        self.selection = Selection(context, self.maps, self.used, self.streams.groups)
        self.recurrent = {
            linear_map.node: RecurrentRefit(context, linear_map, source_runs, self.selection)
            for linear_map in self.maps
            if linear_map.kind == RECURRENT
        }

    def run(self) -> dict[str, Tensor]:
        """Fits every map and returns the new state."""
        maps = self.maps
        self.targets.draw(self._widths(), self.selection.is_at_once)
        if self.selection.groups:
            self.selection.choose(self._products())
            if self.context.note is not None:
                self.context.note(self.selection.described())
        self.streams.prepare(self.batches, self.runs, self.source_runs)
        for number, linear_map in enumerate(maps, start=1):
            if self.streams.owns(linear_map):
                self.streams.fit(linear_map, self.selection)
            elif linear_map.kind == RECURRENT:
                self.recurrent[linear_map.node].fit(self.state, self.runs)
            else:
                self._fit(linear_map)
            if self.context.progress is not None:
                self.context.progress(number, len(maps), f"refit {linear_map.weight}")
        self.streams.finish()
        return self.state

    def _widths(self) -> dict[str, int]:
        """Returns the weights that the choice of neurons reads, with their inputs in all sources."""
        readers = {reading.name for reading in self.selection.readers} if self.selection.groups else set()
        states = [self.context.sources[source].state for source in self.used]
        return {
            linear_map.weight: sum(rows_of(linear_map, state[linear_map.weight]).shape[1] for state in states)
            for linear_map in self.maps
            if linear_map.weight in readers
        }

    def _products(self) -> dict[str, Products]:
        """Returns what every reader takes and makes in the sources, in one pass over the data."""
        readers = self.selection.readers
        pull = PULL_OF_STATES if any(linear_map.is_recurrent for linear_map in readers) else PULL
        products = {linear_map.name: Products(linear_map.has_shift, pull) for linear_map in readers}
        for number in range(len(self.runs)):
            # In the order of the program, so that nothing runs twice.
            for linear_map in self.maps:
                if linear_map.kind == RECURRENT:
                    self.recurrent[linear_map.node].add_products(number, products)
                    continue
                if linear_map.weight in products:
                    self._add_products(linear_map, number, products[linear_map.weight])
                if not self.streams.owns(linear_map):
                    self.targets.keep(linear_map, number)
            for of_source in self.source_runs:
                of_source[number].release()
            if self.context.progress is not None:
                self.context.progress(number + 1, len(self.runs), "refit: reading batches")
        return products

    def _add_products(self, linear_map: LinearMap, number: int, products: Products) -> None:
        states = [self.context.sources[source].state for source in self.used]
        values = [of_source[number].values_of([linear_map.source, linear_map.output]) for of_source in self.source_runs]
        goals = [of_source[linear_map.output] for of_source in values]
        rows = self.targets.choice_rows(linear_map, number, goals[0])
        read = [
            self._read(linear_map, state, of_source[linear_map.source], goals[0].shape, rows)
            for state, of_source in zip(states, values, strict=True)
        ]
        products.add_parts(read, [made_rows(linear_map, of_source, rows) for of_source in goals])

    def _own_rows(self, linear_map: LinearMap, number: int) -> Float[Tensor, "outputs inputs"]:
        """Returns the rows of a source's neurons, in its order, reading neurons in fused order."""
        source, state = self.context.sources[number], self.context.aligned[number]
        places = source.in_fused_order(torch.eye(len(source.state[linear_map.weight])), 1, linear_map.weight)
        nearest = places.abs().argmax(1)
        return _combined(linear_map, state)[nearest] * places.gather(1, nearest[:, None]).sign()

    def _fit(self, linear_map: LinearMap) -> None:
        outputs, inputs = rows_of(linear_map, self.state[linear_map.weight]).shape
        sums = [Sums(inputs, outputs // linear_map.groups) for _ in range(linear_map.groups)]
        other = self.targets.streams[linear_map.node]
        for number, run in enumerate(self.runs):
            target = self.targets.take(linear_map, number)
            values = run.values_of([linear_map.source, *([other] if other is not None else [])])
            goals = self._goals(linear_map, target)
            if other is not None:
                own = taken_back_through(linear_map, run, values[other])
                goals = goals - made_rows(linear_map, own, target.rows)
            read = self._read(linear_map, self.state, values[linear_map.source], target.shape, target.rows)
            inputs_by_group, goals_by_group = (part.chunk(linear_map.groups, 1) for part in (read, goals))
            for of_group, group_inputs, group_goals in zip(sums, inputs_by_group, goals_by_group, strict=True):
                of_group.add(group_inputs, group_goals)
            run.settle()
        self._write(linear_map, sums)

    def _goals(self, linear_map: LinearMap, target: Target) -> Float[Tensor, "samples outputs"]:
        """Returns what the fused map is to make: what chosen neurons make, or the mean of the aligned sources."""
        if linear_map.weight in self.context.joined:
            return torch.cat(target.of_sources, 1)
        chosen = self.selection.rows(linear_map.weight)
        if chosen is not None:
            return torch.cat(target.of_sources, 1)[:, chosen]
        means = [
            self.context.model_weights[source]
            * self.context.sources[source].in_fused_order(part, 1, linear_map.weight, linear_map.output_axis)
            for source, part in zip(self.used, target.of_sources, strict=True)
        ]
        return torch.stack(means).sum(0)

    def _read(
        self,
        linear_map: LinearMap,
        state: Mapping[str, Tensor],
        values: Tensor,
        shape: torch.Size,
        rows: Int[Tensor, " sample"],
    ) -> Float[Tensor, "samples inputs"]:
        arguments = named_arguments(self.nodes[linear_map.node])
        return read_rows(linear_map, state[linear_map.weight], arguments, values, rows, shape)

    def _write(self, linear_map: LinearMap, sums: Sequence[Sums]) -> None:
        state, weight = self.state, self.state[linear_map.weight]
        start = self.selection.start(linear_map.weight, lambda number: self._own_rows(linear_map, number))
        starts = (_combined(linear_map, state) if start is None else start).chunk(linear_map.groups)
        solutions = [part.solve(rows, linear_map.has_shift) for part, rows in zip(sums, starts, strict=True)]
        solution = joined(solutions)
        norm, bias = linear_map.norm, linear_map.bias
        written = {linear_map.weight: weight_of(linear_map, solution.weight, weight)}
        if norm is not None:
            written |= _statistics(norm, solution)
        if bias is not None:
            written[bias] = solution.shift if norm is None else torch.zeros_like(state[bias])
        for name, value in written.items():
            state[name] = value.to(state[name].dtype)


def _statistics(norm: Norm, solution: Solution) -> dict[str, Tensor]:
    """Returns a BatchNorm's numbers for a regression that was fitted through it.

    It keeps the statistics of what it reads, so that training can go on from here.
    """
    written = {norm.variance: solution.variance, norm.mean: solution.mean - solution.shift}
    if norm.scale is not None:
        written[norm.scale] = (solution.variance + norm.epsilon).sqrt()
    else:
        written[norm.variance] = torch.full_like(solution.variance, 1 - norm.epsilon)
    if norm.shift is not None:
        written[norm.shift] = solution.mean
    else:
        written[norm.mean] = torch.zeros_like(solution.mean)
    return written


def _combined(linear_map: LinearMap, state: Mapping[str, Tensor]) -> Float[Tensor, "outputs inputs"]:
    """Returns the rows of a map together with the BatchNorm behind it."""
    rows = rows_of(linear_map, state[linear_map.weight])
    norm = linear_map.norm
    if norm is None:
        return rows
    factor = (state[norm.variance] + norm.epsilon).rsqrt()
    return rows * (factor if norm.scale is None else state[norm.scale] * factor)[:, None]
