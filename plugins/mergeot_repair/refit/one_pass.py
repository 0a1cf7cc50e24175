"""One pass of refit over the maps of a fused model, from its first to its last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mergekit_ot import Aim, RepairContext, named_arguments
from mergeot_repair.programs.maps import RECURRENT, LinearMap, free_maps
from mergeot_repair.programs.running import HeldBytes, staged_runs
from mergeot_repair.refit.norms import combined_rows, norm_numbers
from mergeot_repair.refit.pruning import PULL, PULL_OF_STATES, Products
from mergeot_repair.refit.recurrent_refit import RecurrentRefit
from mergeot_repair.refit.recurrent_results import fit_tokens, token_maps
from mergeot_repair.refit.regression import joined
from mergeot_repair.refit.results import (
    AUTO,
    OUTPUTS,
    PROBABILITIES,
    Classifier,
    ResultRows,
    result_maps,
    saying_target,
)
from mergeot_repair.refit.samples import inside_of, made_rows, read_rows, rows_of, weight_of
from mergeot_repair.refit.selection import Selection
from mergeot_repair.refit.targets import Target, Targets, taken_back_through
from mergeot_repair.refit.wide import AnySums, described, sums_for
from mergeot_repair.streams.finding import Stream
from mergeot_repair.streams.refit import StreamRefit


class RefitPass:
    """One pass over the maps of a fused model.

    Args:
        context: Of the repair.
        streams: The residual streams behind norms of the fused model.
        share: One in so many of the samples that a fit takes is taken.
        target: What results are fitted to where the context's aim is probabilities.
    """

    def __init__(
        self, context: RepairContext, streams: Sequence[Stream] = (), share: int = 1, target: str = OUTPUTS
    ) -> None:
        self.context, self.target = context, target
        self.state = {name: value.detach().clone() for name, value in context.fused.items()}
        self.batches, room = list(context.batches), HeldBytes()
        self.nodes = {node.name: node for node in context.program.graph.nodes}
        self.runs = staged_runs(context.program, self.state, self.batches, room)
        source_runs = [staged_runs(source.program, source.state, self.batches, room) for source in context.sources]
        self.maps = free_maps(context)
        self.tokens = token_maps(context, self.maps) if target in (AUTO, PROBABILITIES) else []
        is_of_classes = target != OUTPUTS and context.aim is Aim.PROBABILITIES and not self.tokens
        self.results = result_maps(context.program, self.maps, context.joined) if is_of_classes else frozenset[str]()
        self.used = [number for number, share in enumerate(context.model_weights) if share > 0]
        self.source_runs = [source_runs[number] for number in self.used]
        self.targets = Targets(context, self.maps, self.source_runs, room, share)
        self.streams = StreamRefit(context, streams, self.used, self.state, self.targets.streams)
        self.selection = Selection(context, self.maps, self.used, self.streams.groups)
        self.recurrent = {
            linear_map.node: RecurrentRefit(context, linear_map, source_runs, self.selection)
            for linear_map in self.maps
            if linear_map.kind == RECURRENT
        }

    def run(self) -> dict[str, Tensor]:
        """Fits every map and returns the new state."""
        self._tell(described(self.context, self.maps, self.used))
        self.targets.draw(self._widths(), self.selection.is_at_once)
        if self.selection.groups:
            self.selection.choose(self._products())
            self._tell(self.selection.described())
        self.streams.prepare(self.batches, self.runs, self.source_runs)
        for number, linear_map in enumerate(self.maps, start=1):
            if self.streams.owns(linear_map):
                self.streams.fit(linear_map, self.selection)
            elif linear_map.kind == RECURRENT:
                self.recurrent[linear_map.node].fit(self.state, self.runs)
            else:
                self._fit(linear_map)
            if self.context.progress is not None:
                self.context.progress(number, len(self.maps), f"refit {linear_map.weight}")
        self.streams.finish()
        return self.state

    def fit_results(self) -> dict[str, Tensor]:
        """Fits the maps that make the results, leaves all others as they are, and returns the new state."""
        makers = result_maps(self.context.program, self.maps, self.context.joined)
        self.targets.draw({}, is_at_once=False)
        for linear_map in (each for each in self.maps if each.node in makers):
            self._fit(linear_map)
        return self.state

    def _tell(self, sentence: str | None) -> None:
        if sentence is not None and self.context.note is not None:
            self.context.note(sentence)

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
        inside = self._inside(linear_map, states[0], values[0][linear_map.source], goals[0].shape, rows)
        products.add_parts(read, [made_rows(linear_map, of_source, rows) for of_source in goals], inside)

    def _own_rows(self, linear_map: LinearMap, number: int) -> Float[Tensor, "outputs inputs"]:
        """Returns the rows of a source's neurons, in its order, reading neurons in fused order."""
        source, state = self.context.sources[number], self.context.aligned[number]
        places = source.in_fused_order(torch.eye(len(source.state[linear_map.weight])), 1, linear_map.weight)
        nearest = places.abs().argmax(1)
        return combined_rows(linear_map, state)[nearest] * places.gather(1, nearest[:, None]).sign()

    def _fit(self, linear_map: LinearMap) -> None:
        outputs, inputs = rows_of(linear_map, self.state[linear_map.weight]).shape
        samples = self.targets.sample_count(linear_map)
        sums = [sums_for(inputs, outputs // linear_map.groups, samples) for _ in range(linear_map.groups)]
        results = ResultRows() if linear_map.node in self.results else None
        other = self.targets.streams[linear_map.node]
        for number, run in enumerate(self.runs):
            target = self.targets.take(linear_map, number)
            values = run.values_of([linear_map.source, *([other] if other is not None else [])])
            goals = self._goals(linear_map, target)
            if other is not None:
                goals = goals - made_rows(linear_map, taken_back_through(linear_map, run, values[other]), target.rows)
            read = self._read(linear_map, self.state, values[linear_map.source], target.shape, target.rows)
            if results is not None:
                shares = [self.context.model_weights[source] for source in self.used]
                results.add(read, goals, target.of_sources, shares)
            inside = self._inside(linear_map, self.state, values[linear_map.source], target.shape, target.rows)
            inputs_by_group, goals_by_group = (part.chunk(linear_map.groups, 1) for part in (read, goals))
            for of_group, group_inputs, group_goals in zip(sums, inputs_by_group, goals_by_group, strict=True):
                of_group.add(group_inputs, group_goals, inside)
            run.settle()
        start = self._start(linear_map)
        self._write(linear_map, sums, start)
        if results is not None:
            self._classify(linear_map, results, start)
        elif linear_map in self.tokens:
            fit_tokens(self.context, linear_map, self.state)

    def _classify(self, linear_map: LinearMap, results: ResultRows, start: Float[Tensor, "outputs inputs"]) -> None:
        """Fits a map that makes classes to probabilities, from where it was before it was fitted to outputs."""
        weight, bias = self.state[linear_map.weight], linear_map.bias
        before = Classifier(start, None if bias is None else self.state[bias])
        target = results.best_target(before) if self.target == AUTO else self.target
        self._tell(saying_target(target) if self.target == AUTO else None)
        if target == OUTPUTS:
            return
        found = results.fitted(target, before)
        self.state[linear_map.weight] = weight_of(linear_map, found.weight, weight)
        if bias is not None and found.shift is not None:
            self.state[bias] = found.shift.to(self.state[bias].dtype)

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

    def _inside(
        self,
        linear_map: LinearMap,
        state: Mapping[str, Tensor],
        values: Tensor,
        shape: torch.Size,
        rows: Int[Tensor, " sample"],
    ) -> Bool[Tensor, "samples taps"] | None:
        arguments = named_arguments(self.nodes[linear_map.node])
        return inside_of(linear_map, state[linear_map.weight], arguments, values.shape, rows, shape)

    def _start(self, linear_map: LinearMap) -> Float[Tensor, "outputs inputs"]:
        """Returns the weights that a map has before it is fitted, of chosen neurons those in their sources."""
        start = self.selection.start(linear_map.weight, lambda number: self._own_rows(linear_map, number))
        return combined_rows(linear_map, self.state) if start is None else start

    def _write(self, linear_map: LinearMap, sums: Sequence[AnySums], start: Float[Tensor, "outputs inputs"]) -> None:
        state, weight = self.state, self.state[linear_map.weight]
        starts = start.chunk(linear_map.groups)
        solutions = [part.solve(rows, linear_map.has_shift) for part, rows in zip(sums, starts, strict=True)]
        solution = joined(solutions)
        norm, bias = linear_map.norm, linear_map.bias
        written = {linear_map.weight: weight_of(linear_map, solution.weight, weight)}
        if norm is not None:
            written |= norm_numbers(norm, solution)
        if bias is not None:
            written[bias] = solution.shift if norm is None else torch.zeros_like(state[bias])
        state.update({name: value.to(state[name].dtype) for name, value in written.items()})
