"""Rotary planes: pinned query and key neurons that positions turn in pairs, as families whose planes may rotate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import networkx as nx
import torch

from mergekit_ot.graph.blocks import blocks_of, places_of
from mergekit_ot.graph.ir import AxisSlot, ModelGraph, NeuronGroup
from mergekit_ot.graph.layouts import (
    OUT,
    AxisLayout,
    Blocks,
    Choice,
    Factors,
    Fixed,
    Neurons,
    layout_size,
    leaf_groups,
)
from mergekit_ot.graph.symmetry.operands import operands

# Two halves of the same size: neuron i is turned together with neuron i + n/2.
_HALVES = 2

# Where a pair of halves stands: parameter, axis, path in the axis' layout.
_Place = tuple[str, int, tuple[int, ...]]


def with_rotary_groups(graph: ModelGraph) -> ModelGraph:
    """Returns the graph with every pinned pair of halves as one pinned group: a family of the heads around it.

    Nothing becomes free by that: the group keeps the reason of its pin. It gets a name under which a symmetry can act
    on it. Layers that share one table of angles are pinned together; each gets a group of its own. A graph without
    such pairs is returned as it is.

    Args:
        graph: The model's graph.
    """
    found = {
        group.key: places for group in graph.pinned_groups.values() if (places := _pairs_of_halves(graph, group)) != {}
    }
    for key, places in found.items():
        graph = _with_groups(graph, graph.groups[key], _that_meet(graph, places))
    return graph


def _pairs_of_halves(graph: ModelGraph, group: NeuronGroup) -> dict[_Place, Blocks]:
    """Returns where a pinned group stands twice side by side, once as each half; empty where it also stands alone."""
    counts: dict[_Place, int] = {}
    for slot in group.members:
        if not slot.path:
            return {}
        where = slot.parameter, slot.axis, slot.path[:-1]
        counts[where] = counts.get(where, 0) + 1
    pairs = {}
    for where, count in counts.items():
        layout = _at(graph.layouts[where[0]][where[1]], where[2])
        is_pair = isinstance(layout, Blocks) and layout.parts == (Fixed(group.size),) * _HALVES
        if count != _HALVES or not is_pair:
            return {}
        pairs[where] = layout
    return pairs


def _at(layout: AxisLayout, path: tuple[int, ...]) -> AxisLayout | None:
    for place in path:
        if isinstance(layout, Neurons | Fixed):
            return None
        inner = layout.options if isinstance(layout, Choice) else layout.parts
        if place >= len(inner):
            return None
        layout = inner[place]
    return layout


def _that_meet(graph: ModelGraph, places: dict[_Place, Blocks]) -> list[dict[_Place, Blocks]]:
    """Returns the places apart by layers: queries go with the keys that they are first computed together with.

    All of them stay together where that leaves one out.
    """
    counts: dict[str, int] = {}
    for name, _, _ in places:
        counts[name] = counts.get(name, 0) + 1
    sets = list(_meetings(graph, counts))
    if sorted(name for names in sets for name in names) != sorted(counts):
        return [places]
    return [{where: pair for where, pair in places.items() if where[0] in names} for names in sets]


def _meetings(graph: ModelGraph, counts: dict[str, int]) -> Iterator[frozenset[str]]:
    """Yields the parameters that are first read together, once as queries and once as keys.

    Args:
        graph: The model's graph.
        counts: Parameter → in how many places it holds such neurons: two in a fused weight of queries and keys.
    """
    makers = {node: name for name, node in operands(graph, counts).items()}
    carried: dict[str, frozenset[str]] = {}
    met: set[str] = set()
    weights = set(makers)
    for node in nx.topological_sort(graph.operations):
        if node in makers:
            carried[node] = frozenset([makers[node]])
            continue
        before = list(graph.operations.predecessors(node))
        if before and weights.issuperset(before):
            weights.add(node)
        brought = [carried[each] - met for each in before if each in carried and each not in weights]
        names = frozenset().union(*(carried.get(each, frozenset()) for each in before)) - met
        is_fused = any(counts[name] > 1 for name in names)
        if len([each for each in brought if each]) > 1 and (is_fused or len(set(brought)) > 1):
            yield names
            met |= names
        elif names:
            carried[node] = names


def _with_groups(graph: ModelGraph, halves: NeuronGroup, apart: list[dict[_Place, Blocks]]) -> ModelGraph:
    """Returns the graph with a group of both halves for each set of places, instead of one group of the halves."""
    layouts, roles = dict(graph.layouts), dict(graph.roles)
    named = [_whole_group(graph, halves, places) for places in apart]
    for group in named:
        for slot in group.members:
            axes = list(layouts[slot.parameter])
            axes[slot.axis] = _replaced(axes[slot.axis], slot.path, Neurons(group.key, group.size))
            layouts[slot.parameter] = tuple(axes)
            roles[slot.parameter, slot.axis, group.key] = OUT
    named = [replace(group, context=tuple(_always_beside(group, layouts))) for group in named]
    groups = {}
    for each in graph.groups.values():
        groups |= {kept.key: kept for kept in (named if each is halves else [each])}
    held = {name: vars(graph)[name] for name in ("operations", "program")}
    return replace(graph, **held, layouts=layouts, roles=roles, groups=groups)


def _whole_group(graph: ModelGraph, halves: NeuronGroup, places: dict[_Place, Blocks]) -> NeuronGroup:
    parameter, axis, path = next(iter(places))
    return replace(
        halves,
        key=f"{parameter}:{axis}" + "".join(f".{place}" for place in path),
        size=_HALVES * halves.size,
        members=tuple(AxisSlot(name, where, inside, OUT) for name, where, inside in places),
        context=tuple(_shared_context(graph, places)),
    )


def _shared_context(graph: ModelGraph, places: dict[_Place, Blocks]) -> list[str]:
    """Returns the free groups that stand beside the halves wherever these stand: the heads."""
    shared: list[str] | None = None
    for name, axis, path in places:
        beside = [key for key in _beside(graph.layouts[name][axis], path) if key in graph.free_groups]
        shared = beside if shared is None else [key for key in shared if key in beside]
    return shared or []


def _always_beside(group: NeuronGroup, layouts: Mapping[str, Sequence[AxisLayout]]) -> list[str]:
    """Returns the groups of a context that stand beside a group in every block: parts of a fused weight have others."""
    context = list(group.context)
    for name in dict.fromkeys(slot.parameter for slot in group.members):
        shape = [layout_size(layout) for layout in layouts[name]]
        for block in blocks_of(torch.empty(shape, device="meta"), layouts[name]):
            for place in places_of(block, group.key):
                axis = block.dimensions[place].axis
                there = {dimension.group for dimension in block.dimensions if dimension.axis == axis}
                context = [key for key in context if key in there]
    return context


def _beside(layout: AxisLayout, path: tuple[int, ...]) -> Iterator[str]:
    """Yields the groups that are factors beside a place of a layout."""
    if not path or isinstance(layout, Neurons | Fixed):
        return
    inner = layout.options if isinstance(layout, Choice) else layout.parts
    if isinstance(layout, Factors):
        for number, part in enumerate(inner):
            if number != path[0]:
                yield from leaf_groups(part)
    yield from _beside(inner[path[0]], path[1:])


def _replaced(layout: AxisLayout, path: tuple[int, ...], new: AxisLayout) -> AxisLayout:
    if not path:
        return new
    if isinstance(layout, Neurons | Fixed):
        return layout
    inner = list(layout.options if isinstance(layout, Choice) else layout.parts)
    inner[path[0]] = _replaced(inner[path[0]], path[1:], new)
    if isinstance(layout, Factors):
        return Factors(tuple(inner))
    return Blocks(layout.number, tuple(inner)) if isinstance(layout, Blocks) else Choice(layout.number, tuple(inner))
