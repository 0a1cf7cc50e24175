"""Chooses neurons of the fused model among those of the sources, by what the maps that read them need.

The mean of two matched neurons that agree little says little about either. Where neurons are made and read by linear
maps alone, also through the sums of a residual stream or a recurrent cell, the fused model need not average at all: the
sources side by side are a network of which the fused one is a part, and the part is chosen by structured pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergekit_ot import IN, ModelGraph, NeuronGroup, RepairContext
from mergeot_repair.programs.layouts import stretches
from mergeot_repair.programs.maps import RECURRENT, LinearMap
from mergeot_repair.refit import wide
from mergeot_repair.refit.pruning import Products, Regression, eliminate, places_of
from mergeot_repair.refit.readings import Reading, all_readings
from mergeot_repair.refit.recurrent import Cell, layers_of

# Neurons of a layer that is chosen alone may go so many times as fast; measured, the fused networks are as near.
_PACE_OF_A_LAYER = 2


class Selection:
    """The neurons that a fused model takes over from its sources.

    Args:
        context: Of the repair.
        maps: The linear maps of the fused model.
        used: Numbers of the sources that have a weight.
        excluded: Groups that are chosen elsewhere.
    """

    def __init__(
        self,
        context: RepairContext,
        maps: Sequence[LinearMap],
        used: Sequence[int],
        excluded: AbstractSet[str] = frozenset(),
    ) -> None:
        self.context, self.used, self.excluded = context, list(used), excluded
        self.alignment = context.sources[0].alignment
        nodes = {node.name: node for node in context.program.graph.nodes}
        cells: list[tuple[Cell, int]] = []
        for linear_map in maps:
            if linear_map.kind == RECURRENT:
                for directions in layers_of(linear_map, nodes[linear_map.node]):
                    cells += [(cell, context.fused[cell.names[1]].shape[1]) for cell in directions]
        self.readings = all_readings(maps, cells)
        self.groups = self._eligible(self.alignment.target) if len(self.used) > 1 else set()
        self.places, self.count = self._numbered()
        self.kept: dict[str, Int[Tensor, " neuron"]] = {}
        self.regressions: dict[str, Regression] = {}

    @property
    def readers(self) -> list[Reading]:
        """The maps that read neurons to be chosen."""
        return self._readers_of(self.groups)

    def _readers_of(self, groups: set[str]) -> list[Reading]:
        """Returns the maps that read some of the groups, and the recurrent cells to be chosen."""
        readings = self.readings.values()
        return [reading for reading in readings if self._reads(reading) & groups or self._is_cell(reading)]

    def choose(self, products: Mapping[str, Products]) -> None:
        """Chooses: from the last layer to the first or, where there are streams or recurrent cells, all at once.

        Args:
            products: Of every reader.
        """
        # What a stream or a state has to hold depends on which of its readers' neurons stay: all are chosen together.
        if self.is_at_once:
            self._choose(list(self.places), products)
            return
        makers = self._makers()
        layers = [group for group, numbers in makers.items() if numbers]
        for group in sorted(layers, key=lambda layer: -makers[layer][0]):
            self._choose([group], products)

    @property
    def is_at_once(self) -> bool:
        """Whether all groups are chosen together, because there are streams or recurrent cells."""
        has_streams = any(len(numbers) > 1 for numbers in self._makers().values())
        return has_streams or any(map(self._is_cell, self.readings.values()))

    def _makers(self) -> dict[str, list[int]]:
        """Returns group → the numbers of the readings that make it."""
        makers: dict[str, list[int]] = {group: [] for group in self.places}
        for number, name in enumerate(self.readings):
            for group in self._makes(name) & self.groups:
                makers[group].append(number)
        return makers

    def described(self) -> str:
        """Returns a sentence about which source the chosen neurons come from."""
        kept = torch.cat(list(self.kept.values()))
        shares = []
        for place, number in enumerate(self.used):
            own = torch.cat([of_sources[place] for of_sources in self.places.values()])
            shares.append(f"{int(torch.isin(kept, own).sum()):,} from source {number + 1}")
        groups = "1 group" if len(self.kept) == 1 else f"{len(self.kept)} groups"
        return f"Refit took over {len(kept):,} neurons of {groups}: {', '.join(shares)}."

    def _choose(self, groups: Sequence[str], products: Mapping[str, Products]) -> None:
        readers = [reading.name for reading in self._readers_of(set(groups))]
        regressions = {name: self._regression(name, products[name]) for name in readers}
        sizes = {group: self.alignment.target.groups[group].size for group in groups}
        places = {group: self.places[group] for group in groups}
        pace = 1 if self.is_at_once else _PACE_OF_A_LAYER
        self.kept |= eliminate(list(regressions.values()), places, sizes, self.context.progress, pace)
        self.regressions |= {name: regression.released() for name, regression in regressions.items()}

    def _regression(self, name: str, products: Products) -> Regression:
        """Returns the regression of a reader on what is left of its neurons."""
        reading = self.readings[name]
        read = [self._read_numbers(reading, source) for source in range(len(self.used))]
        neurons = torch.cat([self._fixed(reading), *read])
        made = None
        if self.rows(name) is None and self._makes(name) & self.groups:
            made = self._made_numbers(reading)
        regression = Regression(products, self._goals(name), neurons, made)
        for group in self._reads(reading) & set(self.kept):
            everything = torch.cat(list(self.places[group]))
            regression.drop(everything[~torch.isin(everything, self.kept[group])])
        return regression

    def _goals(self, name: str) -> Float[Tensor, "outputs goals"]:
        """Returns what a reader is to make, as sums of its outputs in the sources.

        Those of chosen neurons; of all, where they are still to be chosen; else the means of aligned ones.
        """
        rows = self.rows(name)
        if rows is not None:
            return torch.eye(len(self._roots(name)))[:, rows]
        if self._makes(name) & self.groups:
            return torch.diag(self._roots(name)).float()
        weight = self.readings[name].weights[0]
        if weight in self.context.joined:
            return torch.eye(sum(len(self.context.sources[number].state[weight]) for number in self.used))
        means = []
        for number in self.used:
            source = self.context.sources[number]
            ordered = source.in_fused_order(torch.eye(len(source.state[weight])), 1, weight)
            means.append(self.context.model_weights[number] * ordered)
        return torch.cat(means)

    def rows(self, name: str) -> Int[Tensor, " output"] | None:
        """Returns which outputs of a map, of all used sources side by side, the fused map has; None for no choice."""
        if name not in self.readings:
            return None
        groups = self._makes(name)
        if not groups or not groups <= set(self.kept):
            return None
        reading = self.readings[name]
        return places_of(self._wanted(reading), self._made_numbers(reading), reading.repeats)

    def states(self, name: str) -> Int[Tensor, " neuron"]:
        """Returns which hidden neurons, of all used sources side by side, the fused cell has."""
        reading = self.readings[name]
        numbers: list[Tensor] = []
        for source in range(len(self.used)):
            numbers += [self.places[group][source] for group in self._makes(name)]
        return places_of(self._wanted(reading), torch.cat(numbers))

    def start(self, name: str, own: Callable[[int], Tensor] | None = None) -> Float[Tensor, "outputs inputs"] | None:
        """Returns the weights from which a map is fitted: those of its regression, or its own in the sources.

        Args:
            name: The map.
            own: Gives, for a source, the rows of its neurons, reading neurons in fused order.
        """
        rows = self.rows(name)
        if name in self.regressions:
            regression, reading = self.regressions[name], self.readings[name]
            order = torch.cat([self._fixed(reading), *(self._fused(weight) for weight in reading.weights)])
            weights = regression.rows(order, self._wanted(reading) if rows is not None else None, reading.repeats)
            return weights if rows is None or regression.made is None else weights / self._roots(name)[rows, None]
        return None if rows is None or own is None else torch.cat([own(number) for number in self.used])[rows]

    def _roots(self, name: str) -> Float[Tensor, " output"]:
        """Returns the factor of each output of all sources as a goal: a source counts by its model weight."""
        reading = self.readings[name]
        weight, axis = reading.makes
        sizes = [reading.repeats * self.context.sources[number].state[weight].shape[axis] for number in self.used]
        shares = [self.context.model_weights[number] ** 0.5 for number in self.used]
        return torch.cat([torch.full((size,), share) for size, share in zip(sizes, shares, strict=True)]).double()

    def _wanted(self, reading: Reading) -> Int[Tensor, " neuron"]:
        """Returns the numbers of the neurons that the fused map makes, once each."""
        return torch.cat([self.kept[group] for group, _ in reading.made(self.alignment.target) or ()])

    def _fused(self, weight: str) -> Int[Tensor, " neuron"]:
        """Returns the numbers of the neurons that the fused map reads; none where they are not chosen."""
        standing = stretches(self.alignment.target, weight, 1) or ()
        return _joined([self.kept[group] for group, _ in standing if group in self.kept])

    def reads_chosen(self, weight: str) -> bool:
        """Whether what stands on the columns of a weight is among what is chosen."""
        groups = {group for group, _ in stretches(self.alignment.target, weight, 1) or ()}
        return bool(groups) and groups <= self.groups

    def _fixed(self, reading: Reading) -> Int[Tensor, " input"]:
        """Returns numbers for inputs that are not chosen: no neuron has them, so they are never dropped."""
        sizes = [self.context.fused[weight].shape[1] for weight in reading.weights if not self.reads_chosen(weight)]
        return self.count + torch.arange(sum(sizes))

    def _read_numbers(self, reading: Reading, source: int) -> Int[Tensor, " neuron"]:
        graph = self.alignment.graphs[self.used[source]]
        numbers: list[Tensor] = []
        for weight in reading.weights:
            if self.reads_chosen(weight):
                numbers += [self.places[group][source] for group, _ in stretches(graph, weight, 1) or ()]
        return _joined(numbers)

    def _made_numbers(self, reading: Reading) -> Int[Tensor, " neuron"]:
        """Returns the numbers of what a map makes in all used sources; those of a cell stand there for every gate."""
        numbers = []
        for source, model in enumerate(self.used):
            of_source = [self.places[group][source] for group, _ in reading.made(self.alignment.graphs[model]) or ()]
            numbers.append(torch.cat(of_source).repeat(reading.repeats))
        return torch.cat(numbers)

    def _reads(self, reading: Reading) -> set[str]:
        return reading.reads_groups(self.alignment.target)

    def _makes(self, name: str) -> set[str]:
        return self.readings[name].makes_groups(self.alignment.target)

    def _is_cell(self, reading: Reading) -> bool:
        """Whether it belongs to a recurrent cell whose neurons are to be chosen: these are read by it, too."""
        made = reading.makes_groups(self.alignment.target)
        return reading.is_recurrent and bool(made) and made <= self.groups

    def _numbered(self) -> tuple[dict[str, list[Int[Tensor, " neuron"]]], int]:
        """Returns group → the numbers of its neurons in every used source, no two the same; and how many there are."""
        places: dict[str, list[Tensor]] = {}
        count = 0
        for group in sorted(self.groups):
            places[group] = []
            for number in self.used:
                size = self.alignment.graphs[number].groups[group].size
                places[group].append(torch.arange(count, count + size))
                count += size
        return places, count

    def _eligible(self, graph: ModelGraph) -> set[str]:
        """Returns the groups that linear maps alone make and read, and of which there are more than fit."""
        readings = self.readings.values()
        owned = set[str]().union(*(reading.owned for reading in readings))
        columns = set[str]().union(*(reading.weights for reading in readings))
        eligible = set()
        for key, group in graph.free_groups.items():
            total = sum(self.alignment.graphs[number].groups[key].size for number in self.used)
            is_free = key not in self.excluded and total > group.size
            if is_free and _is_owned(group, owned, columns):
                eligible.add(key)
        while True:
            kept = {key for key in eligible if self._is_whole(graph, key, eligible)}
            if kept == eligible:
                return eligible
            eligible = kept

    def _is_whole(self, graph: ModelGraph, group: str, eligible: set[str]) -> bool:
        """Whether all axes on which a group stands are to be chosen as a whole."""
        for slot in graph.groups[group].members:
            is_vector = len(graph.layouts[slot.parameter]) == 1
            if not is_vector and not self._is_whole_axis(graph, slot.parameter, slot.axis, eligible):
                return False
        return True

    def _is_whole_axis(self, graph: ModelGraph, name: str, axis: int, eligible: set[str]) -> bool:
        """Whether all that stands on an axis is to be chosen, in stretches of the same kind."""
        owner = next((reading for reading in self.readings.values() if name in reading.owned), None)
        if owner is None:
            return False
        taps_made = _taps_of(owner.made(graph), eligible)
        is_made = taps_made is not None and taps_made <= {1}
        if axis == 0:
            return is_made
        taps = _taps_of(stretches(graph, name, 1), eligible)
        if taps is None or len(taps) != 1:
            return False
        # The columns of a cell's two weights stand side by side, and what it makes is what it reads.
        if owner.is_recurrent and not (is_made and taps == {1}):
            return False
        return self._inputs(name) <= wide.MOST_INPUTS_OF_A_CHOICE

    def _inputs(self, weight: str) -> int:
        """Returns how many inputs a map has in all used sources together."""
        return sum(self.context.sources[number].state[weight][0].numel() for number in self.used)


def _joined(numbers: Sequence[Tensor]) -> Int[Tensor, " neuron"]:
    return torch.cat(list(numbers)) if numbers else torch.empty(0, dtype=torch.long)


def _is_owned(group: NeuronGroup, owned: set[str], columns: set[str]) -> bool:
    """Whether a group stands on the first axis of what linear maps own, and on columns that they read, alone."""
    # What is normalised over its neurons, or shares its order with a context, is no set of independent ones.
    if group.context or group.flags:
        return False
    for slot in group.members:
        is_read = slot.role == IN
        if slot.axis != int(is_read) or slot.parameter not in (columns if is_read else owned):
            return False
    return True


def _taps_of(standing: Sequence[tuple[str, int]] | None, groups: set[str]) -> set[int] | None:
    """Returns the numbers per neuron of what stands on an axis; None where something there is none of the groups."""
    if standing is None or not {group for group, _ in standing} <= groups:
        return None
    return {taps for _, taps in standing}
