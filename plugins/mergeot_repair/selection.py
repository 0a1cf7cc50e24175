"""Chooses neurons of the fused model among those of the sources, by what the maps that read them need.

The mean of two matched neurons that agree little says little about either. Where neurons are made and read by linear
maps alone, also through the sums of a residual stream, the fused model need not average at all: the sources side by
side are a network of which the fused one is a part, and the part is chosen by structured pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergekit_ot import ModelGraph, RepairContext
from mergeot_repair.maps import LinearMap
from mergeot_repair.pruning import Products, Regression, eliminate, places_of

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
        self.maps = {one.weight: one for one in maps if one.is_plain}
        self.groups = self._eligible(self.alignment.target) if len(self.used) > 1 else set()
        self.places = self._numbered()
        self.kept: dict[str, Int[Tensor, " neuron"]] = {}
        self.regressions: dict[str, Regression] = {}

    @property
    def readers(self) -> list[LinearMap]:
        """The maps that read neurons to be chosen."""
        return [one for one in self.maps.values() if self._groups_on(one.weight, 1) & self.groups]

    def choose(self, products: Mapping[str, Products]) -> None:
        """Chooses: from the last layer to the first or, where there are streams, all at once.

        Args:
            products: Of every reader.
        """
        order = list(self.maps)
        makers = {group: [name for name in order if group in self._groups_on(name, 0)] for group in self.groups}
        streams = [group for group in self.places if len(makers[group]) > 1]
        single = [group for group in self.places if len(makers[group]) == 1]
        single.sort(key=lambda group: -order.index(makers[group][0]))
        # What a stream has to hold depends on which of its readers' neurons stay, so both are chosen together.
        for chosen in [list(self.places)] if streams else [[group] for group in single]:
            self._choose(chosen, products)

    def described(self) -> str:
        """Returns a sentence about which source the chosen neurons come from."""
        kept = torch.cat(list(self.kept.values()))
        shares = []
        for place, number in enumerate(self.used):
            own = torch.cat([parts[place] for parts in self.places.values()])
            shares.append(f"{int(torch.isin(kept, own).sum()):,} from source {number + 1}")
        return f"Refit took over {len(kept):,} neurons of {len(self.kept)} groups: {', '.join(shares)}."

    def _choose(self, groups: Sequence[str], products: Mapping[str, Products]) -> None:
        readers = [one.weight for one in self.readers if self._groups_on(one.weight, 1) & set(groups)]
        found = {name: self._regression(name, products[name]) for name in readers}
        sizes = {group: self.alignment.target.groups[group].size for group in groups}
        places = {group: self.places[group] for group in groups}
        self.kept |= eliminate(list(found.values()), places, sizes, self._told)
        self.regressions |= found

    def _told(self, dropped: int, surplus: int) -> None:
        if self.context.progress is not None:
            self.context.progress(dropped, surplus, "refit: choosing neurons")

    def _regression(self, weight: str, products: Products) -> Regression:
        """Returns the regression of a reader on what is left of its neurons."""
        neurons = torch.cat([self._numbers(weight, 1, source) for source in range(len(self.used))])
        made = None
        if self.rows(weight) is None and self._groups_on(weight, 0) & self.groups:
            made = torch.cat([self._numbers(weight, 0, source) for source in range(len(self.used))])
        regression = Regression(products, self._goals(weight), neurons, made)
        for group in self._groups_on(weight, 1) & set(self.kept):
            everything = torch.cat(list(self.places[group]))
            regression.drop(everything[~torch.isin(everything, self.kept[group])])
        return regression

    def _goals(self, weight: str) -> Float[Tensor, "outputs goals"]:
        """Returns what a reader is to make, as sums of its outputs in the sources.

        Those of chosen neurons; of all, where they are still to be chosen; else the means of aligned ones.
        """
        sources = [self.context.sources[number] for number in self.used]
        shares = [self.context.model_weights[number] for number in self.used]
        sizes = [len(source.state[weight]) for source in sources]
        rows = self.rows(weight)
        if rows is not None:
            return torch.eye(sum(sizes))[:, rows]
        if self._groups_on(weight, 0) & self.groups:
            return torch.diag(self._roots(weight)).float()
        parts = [
            share * source.in_fused_order(torch.eye(size), 1, weight)
            for share, source, size in zip(shares, sources, sizes, strict=True)
        ]
        return torch.cat(parts)

    def rows(self, weight: str) -> Int[Tensor, " output"] | None:
        """Returns which outputs of a map, of all used sources side by side, the fused map has; None for no choice."""
        groups = self._groups_on(weight, 0)
        if not groups or not groups <= set(self.kept):
            return None
        numbers = torch.cat([self._numbers(weight, 0, source) for source in range(len(self.used))])
        wanted = self._fused(weight, 0)
        return places_of(wanted, numbers)

    def start(self, weight: str, own: Callable[[int], Tensor]) -> Float[Tensor, "outputs inputs"] | None:
        """Returns the weights from which a map is fitted: those of its regression, or its own in the sources.

        Args:
            weight: The map.
            own: Gives, for a source, the rows of its neurons, reading neurons in fused order.
        """
        rows = self.rows(weight)
        if weight in self.regressions:
            regression = self.regressions[weight]
            found = regression.rows(self._fused(weight, 1), self._fused(weight, 0) if rows is not None else None)
            return found if rows is None or regression.made is None else found / self._roots(weight)[rows, None]
        return None if rows is None else torch.cat([own(number) for number in self.used])[rows]

    def _roots(self, weight: str) -> Float[Tensor, " output"]:
        """Returns the factor of each output of all sources as a goal: a source counts by its model weight."""
        parts = [
            torch.full((len(self.context.sources[number].state[weight]),), self.context.model_weights[number] ** 0.5)
            for number in self.used
        ]
        return torch.cat(parts).double()

    def _fused(self, weight: str, axis: int) -> Int[Tensor, " neuron"]:
        return torch.cat([self.kept[group] for group, _ in stretches(self.alignment.target, weight, axis) or ()])

    def _numbers(self, weight: str, axis: int, source: int) -> Int[Tensor, " neuron"]:
        """Returns the numbers of the neurons on an axis of a source's weight, in its order."""
        graph = self.alignment.graphs[self.used[source]]
        return torch.cat([self.places[group][source] for group, _ in stretches(graph, weight, axis) or ()])

    def _groups_on(self, weight: str, axis: int) -> set[str]:
        return {group for group, _ in stretches(self.alignment.target, weight, axis) or ()}

    def _numbered(self) -> dict[str, list[Int[Tensor, " neuron"]]]:
        """Returns group → the numbers of its neurons in every used source; no two neurons have the same."""
        found: dict[str, list[Tensor]] = {}
        count = 0
        for group in sorted(self.groups):
            found[group] = []
            for number in self.used:
                size = self.alignment.graphs[number].groups[group].size
                found[group].append(torch.arange(count, count + size))
                count += size
        return found

    def _eligible(self, graph: ModelGraph) -> set[str]:
        """Returns the groups that linear maps alone make and read, and of which there are more than fit."""
        owned = {name for one in self.maps.values() for name in (one.bias, *(one.norm or ())) if name}
        found = set()
        for key, group in graph.free_groups.items():
            total = sum(self.alignment.graphs[number].groups[key].size for number in self.used)
            is_owned = all(
                (slot.axis == 0 and slot.parameter in owned and slot.role != "IN")
                or (slot.parameter in self.maps and slot.axis == (1 if slot.role == "IN" else 0))
                for slot in group.members
            )
            # What is normalised over its neurons, or shares its order with a context, is no set of independent ones.
            if is_owned and not group.context and not group.flags and total > group.size:
                found.add(key)
        while True:
            kept = {
                key
                for key in found
                if all(self._is_whole(graph, name, axis, found) for name, axis in _axes(graph, key))
            }
            if kept == found:
                return found
            found = kept

    def _is_whole(self, graph: ModelGraph, name: str, axis: int, found: set[str]) -> bool:
        """Whether all that stands on an axis is to be chosen, in stretches of the same kind."""
        parts = stretches(graph, name, axis)
        if parts is None or not {group for group, _ in parts} <= found or len({taps for _, taps in parts}) != 1:
            return False
        if axis == 0:
            return parts[0][1] == 1
        return sum(self.context.sources[number].state[name][0].numel() for number in self.used) <= _MOST_INPUTS


def _axes(graph: ModelGraph, group: str) -> set[tuple[str, int]]:
    """Returns the weights' axes on which a group stands."""
    return {
        (slot.parameter, slot.axis) for slot in graph.groups[group].members if len(graph.layouts[slot.parameter]) > 1
    }


def stretches(graph: ModelGraph, weight: str, axis: int) -> list[tuple[str, int]] | None:
    """Returns (group, numbers per neuron) along an axis; None where something else stands there.

    A layout is a group, a group times fixed places behind it, or several of these one after the other.
    """
    return _stretches(graph.layouts[weight][axis])


def _stretches(layout: object) -> list[tuple[str, int]] | None:
    group, parts = getattr(layout, "group", None), getattr(layout, "parts", None)
    if group is not None:
        return [(group, 1)]
    if parts is None:
        return None
    if hasattr(layout, "number"):
        found = [_stretches(part) for part in parts]
        return None if any(one is None for one in found) else [pair for one in found for pair in one or ()]
    first, rest = parts[0], parts[1:]
    if getattr(first, "group", None) is None or any(
        _stretches(part) is not None or not hasattr(part, "size") for part in rest
    ):
        return None
    taps = 1
    for part in rest:
        taps *= part.size
    return [(first.group, taps)]
