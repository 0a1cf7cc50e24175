"""Chooses neurons of the fused model among those of the sources, by what the maps that read them need.

The mean of two matched neurons that agree little says little about either. Where neurons are made and read by linear
maps alone, also through the sums of a residual stream or a recurrent cell, the fused model need not average at all: the
sources side by side are a network of which the fused one is a part, and the part is chosen by structured pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergekit_ot import IN, ModelGraph, RepairContext
from mergeot_repair.programs.layouts import stretches
from mergeot_repair.programs.maps import RECURRENT, LinearMap
from mergeot_repair.refit.pruning import Products, Regression, eliminate, places_of
from mergeot_repair.refit.readings import Reading, all_readings
from mergeot_repair.refit.recurrent import layers_of

# Inputs of a regression beyond which its inverse takes minutes and gigabytes.
_MOST_INPUTS = 10_000


class Selection:
    """The neurons that a fused model takes over from its sources.

    Args:
        context: Of the repair.
        maps: The linear maps of the fused model.
        used: Numbers of the sources that have a weight.
    """

    def __init__(self, context: RepairContext, maps: Sequence[LinearMap], used: Sequence[int]) -> None:
        self.context, self.used = context, list(used)
        self.alignment = context.sources[0].alignment
        nodes = {node.name: node for node in context.program.graph.nodes}
        cells = [
            (cell, context.fused[cell.names[1]].shape[1])
            for one in maps
            if one.kind == RECURRENT
            for directions in layers_of(one, nodes[one.node])
            for cell in directions
        ]
        self.readings = all_readings(maps, cells)
        self.groups = self._eligible(self.alignment.target) if len(self.used) > 1 else set()
        self.places, self.count = self._numbered()
        self.kept: dict[str, Int[Tensor, " neuron"]] = {}
        self.regressions: dict[str, Regression] = {}

    @property
    def readers(self) -> list[Reading]:
        """The maps that read neurons to be chosen."""
        return [one for one in self.readings.values() if self._reads(one) & self.groups or self._is_cell(one)]

    def choose(self, products: Mapping[str, Products]) -> None:
        """Chooses: from the last layer to the first or, where there are streams or recurrent cells, all at once.

        Args:
            products: Of every reader.
        """
        order = list(self.readings)
        makers = {group: [name for name in order if group in self._makes(name)] for group in self.groups}
        streams = [group for group in self.places if len(makers[group]) > 1]
        streams += [name for name in order if self._is_cell(self.readings[name])]
        single = [group for group in self.places if len(makers[group]) == 1]
        single.sort(key=lambda group: -order.index(makers[group][0]))
        # What a stream or a state has to hold depends on which of its readers' neurons stay: all are chosen together.
        for chosen in [list(self.places)] if streams else [[group] for group in single]:
            self._choose(chosen, products)

    def described(self) -> str:
        """Returns a sentence about which source the chosen neurons come from."""
        kept = torch.cat(list(self.kept.values()))
        shares = []
        for place, number in enumerate(self.used):
            own = torch.cat([parts[place] for parts in self.places.values()])
            shares.append(f"{int(torch.isin(kept, own).sum()):,} from source {number + 1}")
        groups = "1 group" if len(self.kept) == 1 else f"{len(self.kept)} groups"
        return f"Refit took over {len(kept):,} neurons of {groups}: {', '.join(shares)}."

    def _choose(self, groups: Sequence[str], products: Mapping[str, Products]) -> None:
        readers = [one.name for one in self.readers if self._reads(one) & set(groups) or self._is_cell(one)]
        found = {name: self._regression(name, products[name]) for name in readers}
        sizes = {group: self.alignment.target.groups[group].size for group in groups}
        places = {group: self.places[group] for group in groups}
        self.kept |= eliminate(list(found.values()), places, sizes, self._told)
        self.regressions |= found

    def _told(self, dropped: int, surplus: int) -> None:
        if self.context.progress is not None:
            self.context.progress(dropped, surplus, "refit: choosing neurons")

    def _regression(self, name: str, products: Products) -> Regression:
        """Returns the regression of a reader on what is left of its neurons."""
        one = self.readings[name]
        neurons = torch.cat([self._fixed(one), *(self._read_numbers(one, source) for source in range(len(self.used)))])
        made = None
        if self.rows(name) is None and self._makes(name) & self.groups:
            made = self._made_numbers(one)
        regression = Regression(products, self._goals(name), neurons, made)
        for group in self._reads(one) & set(self.kept):
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
        parts = []
        for number in self.used:
            source = self.context.sources[number]
            ordered = source.in_fused_order(torch.eye(len(source.state[weight])), 1, weight)
            parts.append(self.context.model_weights[number] * ordered)
        return torch.cat(parts)

    def rows(self, name: str) -> Int[Tensor, " output"] | None:
        """Returns which outputs of a map, of all used sources side by side, the fused map has; None for no choice."""
        if name not in self.readings:
            return None
        groups = self._makes(name)
        if not groups or not groups <= set(self.kept):
            return None
        one = self.readings[name]
        return places_of(self._wanted(one), self._made_numbers(one), one.repeats)

    def states(self, name: str) -> Int[Tensor, " neuron"]:
        """Returns which hidden neurons, of all used sources side by side, the fused cell has."""
        one = self.readings[name]
        numbers = [self.places[group][source] for source in range(len(self.used)) for group in self._makes(name)]
        return places_of(self._wanted(one), torch.cat(numbers))

    def start(self, name: str, own: Callable[[int], Tensor] | None = None) -> Float[Tensor, "outputs inputs"] | None:
        """Returns the weights from which a map is fitted: those of its regression, or its own in the sources.

        Args:
            name: The map.
            own: Gives, for a source, the rows of its neurons, reading neurons in fused order.
        """
        rows = self.rows(name)
        if name in self.regressions:
            regression, one = self.regressions[name], self.readings[name]
            order = torch.cat([self._fixed(one), *(self._fused(weight) for weight in one.weights)])
            found = regression.rows(order, self._wanted(one) if rows is not None else None, one.repeats)
            return found if rows is None or regression.made is None else found / self._roots(name)[rows, None]
        return None if rows is None or own is None else torch.cat([own(number) for number in self.used])[rows]

    def _roots(self, name: str) -> Float[Tensor, " output"]:
        """Returns the factor of each output of all sources as a goal: a source counts by its model weight."""
        one = self.readings[name]
        weight, axis = one.makes
        sizes = [one.repeats * self.context.sources[number].state[weight].shape[axis] for number in self.used]
        shares = [self.context.model_weights[number] ** 0.5 for number in self.used]
        return torch.cat([torch.full((size,), share) for size, share in zip(sizes, shares, strict=True)]).double()

    def _wanted(self, one: Reading) -> Int[Tensor, " neuron"]:
        """Returns the numbers of the neurons that the fused map makes, once each."""
        return torch.cat([self.kept[group] for group, _ in one.made(self.alignment.target) or ()])

    def _fused(self, weight: str) -> Int[Tensor, " neuron"]:
        """Returns the numbers of the neurons that the fused map reads; none where they are not chosen."""
        parts = [
            self.kept[group] for group, _ in stretches(self.alignment.target, weight, 1) or () if group in self.kept
        ]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)

    def reads_chosen(self, weight: str) -> bool:
        """Whether what stands on the columns of a weight is among what is chosen."""
        groups = {group for group, _ in stretches(self.alignment.target, weight, 1) or ()}
        return bool(groups) and groups <= self.groups

    def _fixed(self, one: Reading) -> Int[Tensor, " input"]:
        """Returns numbers for inputs that are not chosen: no neuron has them, so they are never dropped."""
        sizes = [self.context.fused[weight].shape[1] for weight in one.weights if not self.reads_chosen(weight)]
        return self.count + torch.arange(sum(sizes))

    def _read_numbers(self, one: Reading, source: int) -> Int[Tensor, " neuron"]:
        graph = self.alignment.graphs[self.used[source]]
        parts = [
            self.places[group][source]
            for weight in one.weights
            if self.reads_chosen(weight)
            for group, _ in stretches(graph, weight, 1) or ()
        ]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)

    def _made_numbers(self, one: Reading) -> Int[Tensor, " neuron"]:
        """Returns the numbers of what a map makes in all used sources; those of a cell stand there for every gate."""
        found = []
        for source, number in enumerate(self.used):
            parts = [self.places[group][source] for group, _ in one.made(self.alignment.graphs[number]) or ()]
            found.append(torch.cat(parts).repeat(one.repeats))
        return torch.cat(found)

    def _reads(self, one: Reading) -> set[str]:
        return one.reads_groups(self.alignment.target)

    def _makes(self, name: str) -> set[str]:
        return self.readings[name].makes_groups(self.alignment.target)

    def _is_cell(self, one: Reading) -> bool:
        """Whether it belongs to a recurrent cell whose neurons are to be chosen: these are read by it, too."""
        made = one.makes_groups(self.alignment.target)
        return one.is_recurrent and bool(made) and made <= self.groups

    def _numbered(self) -> tuple[dict[str, list[Int[Tensor, " neuron"]]], int]:
        """Returns group → the numbers of its neurons in every used source, no two the same; and how many there are."""
        found: dict[str, list[Tensor]] = {}
        count = 0
        for group in sorted(self.groups):
            found[group] = []
            for number in self.used:
                size = self.alignment.graphs[number].groups[group].size
                found[group].append(torch.arange(count, count + size))
                count += size
        return found, count

    def _eligible(self, graph: ModelGraph) -> set[str]:
        """Returns the groups that linear maps alone make and read, and of which there are more than fit."""
        owned = {name for one in self.readings.values() for name in one.owned}
        columns = {weight for one in self.readings.values() for weight in one.weights}
        found = set()
        for key, group in graph.free_groups.items():
            total = sum(self.alignment.graphs[number].groups[key].size for number in self.used)
            is_owned = all(
                (slot.parameter in owned and slot.axis == 0 and slot.role != IN)
                or (slot.parameter in columns and slot.axis == 1 and slot.role == IN)
                for slot in group.members
            )
            # What is normalised over its neurons, or shares its order with a context, is no set of independent ones.
            if is_owned and not group.context and not group.flags and total > group.size:
                found.add(key)
        while True:
            kept = {key for key in found if all(self._is_whole(graph, *slot, found) for slot in _axes(graph, key))}
            if kept == found:
                return found
            found = kept

    def _is_whole(self, graph: ModelGraph, name: str, axis: int, found: set[str]) -> bool:
        """Whether all that stands on an axis is to be chosen, in stretches of the same kind."""
        for one in self.readings.values():
            if name not in one.owned:
                continue
            made, parts = one.made(graph), stretches(graph, name, 1) if axis else None
            is_made = made is not None and {group for group, _ in made} <= found and all(taps == 1 for _, taps in made)
            if axis == 0:
                return is_made
            if parts is None or not {group for group, _ in parts} <= found or len({taps for _, taps in parts}) != 1:
                return False
            # The columns of a cell's two weights stand side by side, and what it makes is what it reads.
            if one.is_recurrent and not (is_made and parts[0][1] == 1):
                return False
            return sum(self.context.sources[number].state[name][0].numel() for number in self.used) <= _MOST_INPUTS
        return False


def _axes(graph: ModelGraph, group: str) -> set[tuple[str, int]]:
    """Returns the weights' axes on which a group stands."""
    return {
        (slot.parameter, slot.axis) for slot in graph.groups[group].members if len(graph.layouts[slot.parameter]) > 1
    }
