"""Rotary planes: pinned query and key neurons that positions turn in pairs, as families whose planes may rotate."""

from __future__ import annotations

from dataclasses import replace

from mergekit_ot.graph.ir import AxisSlot, ModelGraph, NeuronGroup
from mergekit_ot.graph.layouts import OUT, AxisLayout, Blocks, Choice, Factors, Fixed, Neurons, leaf_groups

# Two halves of the same size: neuron i is turned together with neuron i + n/2.
_HALVES = 2

# Where a pair of halves stands: parameter, axis, path in the axis' layout.
_Place = tuple[str, int, tuple[int, ...]]


def with_rotary_groups(graph: ModelGraph) -> ModelGraph:
    """Returns the graph with every pinned pair of halves as one pinned group: a family of the heads around it.

    Nothing becomes free by that: the group keeps the reason of its pin. It gets a name under which a symmetry can act
    on it. A graph without such pairs is returned as it is.

    Args:
        graph: The model's graph.
    """
    found = {
        group.key: places for group in graph.pinned_groups.values() if (places := _pairs_of_halves(graph, group)) != {}
    }
    for key, places in found.items():
        graph = _with_group(graph, graph.groups[key], places)
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


def _with_group(graph: ModelGraph, halves: NeuronGroup, places: dict[_Place, Blocks]) -> ModelGraph:
    parameter, axis, path = next(iter(places))
    key = f"{parameter}:{axis}" + "".join(f".{place}" for place in path)
    layouts, roles = dict(graph.layouts), dict(graph.roles)
    for name, where, inside in places:
        axes = list(layouts[name])
        axes[where] = _replaced(axes[where], inside, Neurons(key, _HALVES * halves.size))
        layouts[name] = tuple(axes)
        roles[name, where, key] = OUT
    group = replace(
        halves,
        key=key,
        size=_HALVES * halves.size,
        members=tuple(AxisSlot(name, where, inside, OUT) for name, where, inside in places),
        context=tuple(_shared_context(graph, places)),
    )
    groups = {kept.key: kept for kept in (group if each is halves else each for each in graph.groups.values())}
    held = {name: vars(graph)[name] for name in ("operations", "program")}
    return replace(graph, **held, layouts=layouts, roles=roles, groups=groups)


def _shared_context(graph: ModelGraph, places: dict[_Place, Blocks]) -> list[str]:
    """Returns the free groups that stand beside the halves on every one of their axes: the heads."""
    shared: list[str] | None = None
    for name, axis, _ in places:
        beside = [key for key in leaf_groups(graph.layouts[name][axis]) if key in graph.free_groups]
        shared = beside if shared is None else [key for key in shared if key in beside]
    return shared or []


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
