"""Orders of neurons as peers describe them: the group of each axis, and what orders leave apart."""

from __future__ import annotations

from torch import Tensor

from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.layouts import Neurons


def axes_of(graph: ModelGraph) -> dict[str, tuple[str | None, ...]]:
    return {
        name: tuple(
            each.group if isinstance(each, Neurons) and graph.groups[each.group].pin is None else None for each in axes
        )
        for name, axes in graph.layouts.items()
        if name not in graph.buffers
    }


def objective(
    states: list[dict[str, Tensor]], axes: dict[str, tuple[str | None, ...]], orders: dict[str, Tensor]
) -> float:
    total = 0.0
    for name, groups in axes.items():
        moved = states[1][name]
        for axis, group in enumerate(groups):
            moved = moved if group is None else moved.index_select(axis, orders[group].long())
        total += float((states[0][name].double() - moved.double()).square().sum())
    return total
