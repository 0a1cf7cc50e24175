"""Groups that a proof refuted: pinned after the trace, with all that depends on their order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from mergekit_ot.graph.axes.reasons import PinReason
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.layouts import AxisLayout, fixed_layout

# The flag of a group that the trace calls free, and a run of the model does not.
REFUTED = "refuted"


def with_families(graph: ModelGraph, keys: Iterable[str]) -> set[str]:
    """Returns some groups with every family that is indexed by one of them."""
    closed = set(keys)
    while True:
        more = {key for key, group in graph.free_groups.items() if closed & set(group.context)} - closed
        if not more:
            return closed
        closed |= more


def pinned(graph: ModelGraph, keys: Sequence[str], why: str) -> ModelGraph:
    """Returns the graph with some groups pinned and flagged as refuted, and every family indexed by one of them."""
    if not keys:
        return graph
    lost = with_families(graph, keys)

    def fixed(axes: Sequence[AxisLayout]) -> tuple[AxisLayout, ...]:
        return tuple(fixed_layout(axis, lost) for axis in axes)

    groups = {
        key: replace(group, pin=PinReason(why), flags=group.flags | {REFUTED}) if key in lost else group
        for key, group in graph.groups.items()
    }
    # As they are held, since what is made when it is first asked for is not needed here.
    held = {name: vars(graph)[name] for name in ("operations", "program")}
    return replace(
        graph,
        **held,
        groups=groups,
        layouts={name: fixed(axes) for name, axes in graph.layouts.items()},
        values={name: fixed(axes) for name, axes in graph.values.items()},
    )


def refuted_groups(graphs: Iterable[ModelGraph]) -> dict[str, str]:
    """Returns the groups that were refuted in any of some graphs, each with the reason of its pin."""
    return {
        key: group.pin.why
        for graph in graphs
        for key, group in graph.groups.items()
        if group.pin is not None and REFUTED in group.flags
    }
