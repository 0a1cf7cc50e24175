"""Refits the linear maps of a fused model to what the aligned sources compute: no labels, no gradients, one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mergekit_ot import AbstractRepair, Aim, DataError, RepairContext, named_arguments
from mergeot_repair.control import SHIFTED, check_control, check_statistics
from mergeot_repair.programs.maps import RECURRENT, LinearMap, free_maps
from mergeot_repair.programs.running import HeldBytes, staged_runs
from mergeot_repair.refit.candidates import SINGLE, Candidates, Nearness, parted, sources_to_try
from mergeot_repair.refit.disagreeing import saw_different_things
from mergeot_repair.refit.norms import combined_rows, norm_numbers
from mergeot_repair.refit.pieces import in_pieces
from mergeot_repair.refit.pruning import PULL, PULL_OF_STATES, Products
from mergeot_repair.refit.recurrent_refit import RecurrentRefit
from mergeot_repair.refit.regression import joined
from mergeot_repair.refit.results import AUTO, OUTPUTS, Classifier, ResultRows, result_maps, saying_target
from mergeot_repair.refit.samples import inside_of, made_rows, read_rows, rows_of, weight_of
from mergeot_repair.refit.selection import Selection
from mergeot_repair.refit.targets import Target, Targets, taken_back_through
from mergeot_repair.refit.wide import AnySums, described, sums_for
from mergeot_repair.streams.finding import Stream, StreamFinder
from mergeot_repair.streams.refit import StreamRefit

# The control fits what a network makes to itself: a share of the samples shows whether that changes it.
_CONTROL_SHARE = 10


@dataclass(frozen=True)
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

    Attributes:
        target: What the results of a classifier are fitted to. ``outputs``: the mean outputs of the sources.
            ``log-probabilities``: the logarithm of the mean of their probabilities, in closed form.
            ``probabilities``: the mean of their probabilities, with the least Kullback-Leibler divergence. ``auto``:
            outputs, but where the sources are sure of different classes, as after training on different ones, whichever
            of the three gives the answers of their mean probabilities most often.
        neurons: Whose neurons the network has. ``mixed``: those chosen from all. ``single``: those of the source
            that is nearest to the ensemble, with fitted results. ``auto``: whichever is nearer on held-back inputs.
    """

    target: Literal["auto", "outputs", "log-probabilities", "probabilities"] = AUTO
    neurons: Literal["auto", "mixed", "single"] = AUTO

    needs_data: ClassVar[bool] = True

    def aim(self, context: RepairContext) -> Aim:
        """Returns what the results are brought near to; raises DataError where that is classes and there are none."""
        if self.target == OUTPUTS:
            return Aim.OUTPUTS
        maps = free_maps(context)
        of_classes = result_maps(context.program, maps, context.joined)
        if self.target == AUTO:
            makers = [linear_map for linear_map in maps if linear_map.node in of_classes]
            return Aim.PROBABILITIES if saw_different_things(context, makers) else Aim.OUTPUTS
        if not of_classes:
            raise DataError(
                f"Option target={self.target} of repair 'refit' is about classes, and no linear map makes the results "
                "of this network, one number per class. Take target=outputs."
            )
        return Aim.PROBABILITIES

    def repair(self, context: RepairContext) -> dict[str, Tensor]:
        """Returns the fused state with new linear maps.

        Raises:
            DataError: The procedure changes an untouched source, which is its control; or no one source can be taken.
        """
        with in_pieces():
            check_statistics(context, "refit", least_shift=SHIFTED)
            streams = StreamFinder(context, free_maps(context)).find()
            check_control(context, "refit", lambda control: _Refit(control, streams, _CONTROL_SHARE).run())
            refit = _Refit(context, streams, target=self.target)
            alone = sources_to_try(context, self.neurons, bool(refit.selection.groups) and not streams)
            fitted, held_back = parted(context)
            if not alone or not (held_back or self.neurons == SINGLE):
                return refit.run()
            candidates = Candidates(fitted, Nearness(context, held_back or fitted.batches))
            if self.neurons != SINGLE:
                candidates.add_mixed(lambda own: _Refit(own, target=self.target).run())
            candidates.add_nearest_of(alone, lambda own: _Refit(own, target=self.target).fit_results())
            return candidates.nearest()


class _Refit:
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
        batches, room = list(context.batches), HeldBytes()
        self.nodes = {node.name: node for node in context.program.graph.nodes}
        self.runs = staged_runs(context.program, self.state, batches, room)
        source_runs = [staged_runs(source.program, source.state, batches, room) for source in context.sources]
        self.maps = free_maps(context)
        is_of_classes = target != OUTPUTS and context.aim is Aim.PROBABILITIES
        self.results = result_maps(context.program, self.maps, context.joined) if is_of_classes else frozenset[str]()
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
        self._tell(described(self.context, maps, self.used))
        self.targets.draw(self._widths(), self.selection.is_at_once)
        if self.selection.groups:
            self.selection.choose(self._products())
            self._tell(self.selection.described())
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
                own = taken_back_through(linear_map, run, values[other])
                goals = goals - made_rows(linear_map, own, target.rows)
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
        for name, value in written.items():
            state[name] = value.to(state[name].dtype)
