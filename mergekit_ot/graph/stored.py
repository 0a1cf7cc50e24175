"""A model graph as plain data and back: what a file may hold of it. Nothing that is read is taken on trust."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from mergekit_ot.graph.axes.reasons import PinReason
from mergekit_ot.graph.deferred import Deferred
from mergekit_ot.graph.ir import AxisSlot, Diagnostics, ModelGraph, NeuronGroup
from mergekit_ot.graph.layouts import (
    IN,
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

if TYPE_CHECKING:
    import networkx as nx

_DIAGNOSTICS = tuple(field.name for field in fields(Diagnostics))
_DEEPEST = 50
_LARGEST = 1 << 48


class StoredGraphError(ValueError):
    """Plain data that is no graph of the module."""


def graph_as_plain(graph: ModelGraph) -> dict[str, Any]:
    """Returns a graph without its program as lists, texts and whole numbers."""
    operations = graph.operations
    numbers = {name: number for number, name in enumerate(operations)}
    return {
        "layouts": [[name, _plain_axes(axes)] for name, axes in graph.layouts.items()],
        "groups": [_plain_group(group) for group in graph.groups.values()],
        "roles": [[*place, role] for place, role in graph.roles.items()],
        "aliases": [list(pair) for pair in graph.aliases.items()],
        "buffers": sorted(graph.buffers),
        "diagnostics": {name: list(vars(graph.diagnostics)[name]) for name in _DIAGNOSTICS},
        "values": [[name, _plain_axes(axes)] for name, axes in graph.values.items()],
        "operations": [
            [name, data["kind"], data["operation"], data["module_path"]] for name, data in operations.nodes(data=True)
        ],
        "uses": [[numbers[before], numbers[after]] for before, after in operations.edges],
    }


def graph_from_plain(
    data: object, shapes: Mapping[str, Sequence[int]], program: Callable[[], Any] | None = None
) -> ModelGraph:
    """Returns the graph that plain data describe, for a module with tensors of these shapes.

    Args:
        data: From a file.
        shapes: Name of a parameter or buffer → its shape.
        program: Captures the program when it is asked for.

    Raises:
        StoredGraphError: They describe no graph, or that of another module.
    """
    try:
        graph = _Reader(_record(data)).graph()
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise StoredGraphError(f"{type(error).__name__}: {error}") from error
    _check(graph, shapes)
    return graph if program is None else replace(graph, program=Deferred(program), operations=vars(graph)["operations"])


def _plain_axes(axes: Sequence[AxisLayout]) -> list[Any]:
    return list(map(_plain_layout, axes))


def _plain_layout(layout: AxisLayout) -> list[Any]:
    match layout:
        case Neurons(group, size):
            return ["neurons", group, size]
        case Fixed(size):
            return ["fixed", size]
        case Factors(parts):
            return ["factors", *map(_plain_layout, parts)]
        case Blocks(number, parts):
            return ["blocks", number, *map(_plain_layout, parts)]
        case Choice(number, options):
            return ["choice", number, *map(_plain_layout, options)]


def _plain_group(group: NeuronGroup) -> dict[str, Any]:
    pin = group.pin
    return {
        "key": group.key,
        "size": group.size,
        "members": [[slot.parameter, slot.axis, list(slot.path), slot.role] for slot in group.members],
        "context": list(group.context),
        "pin": None if pin is None else [pin.why, pin.operation, pin.module_path, pin.source],
        "flags": sorted(group.flags),
        "first_operation": group.first_operation,
    }


class _Reader:
    """Reads the parts of one graph; each is checked to be of its type."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data

    def graph(self) -> ModelGraph:
        """Returns the graph, without a program."""
        data = self.data
        groups = [_group(each) for each in _list(data["groups"])]
        nodes = [tuple(map(_text, _list(each))) for each in _list(data["operations"])]
        uses = [tuple(map(_number, _list(each))) for each in _list(data["uses"])]
        if any(len(node) != 4 for node in nodes) or any(len(use) != 2 or max(use) >= len(nodes) for use in uses):
            raise StoredGraphError("operations")
        told = _record(data["diagnostics"])
        return ModelGraph(
            operations=Deferred(lambda: _operations(nodes, uses)),  # type: ignore[arg-type]
            layouts=self._axes("layouts"),
            groups={group.key: group for group in groups},
            roles={(_text(name), _number(axis), _text(key)): _role(role) for name, axis, key, role in data["roles"]},
            aliases={_text(alias): _text(name) for alias, name in data["aliases"]},
            buffers=frozenset(map(_text, _list(data["buffers"]))),
            diagnostics=Diagnostics(**{name: tuple(map(_text, _list(told[name]))) for name in _DIAGNOSTICS}),
            values=self._axes("values"),
        )

    def _axes(self, key: str) -> dict[str, tuple[AxisLayout, ...]]:
        return {_text(name): tuple(_layout(axis) for axis in _list(axes)) for name, axes in _list(self.data[key])}


def _operations(nodes: Sequence[tuple[str, ...]], uses: Sequence[tuple[int, ...]]) -> nx.DiGraph:
    import networkx as nx

    graph = nx.DiGraph()
    for name, kind, operation, path in nodes:
        graph.add_node(name, kind=kind, operation=operation, module_path=path)
    graph.add_edges_from((nodes[before][0], nodes[after][0]) for before, after in uses)
    return graph


def _group(data: object) -> NeuronGroup:
    held = _record(data)
    pin = held["pin"]
    members = []
    for parameter, axis, path, role in _list(held["members"]):
        members.append(AxisSlot(_text(parameter), _number(axis), tuple(map(_number, _list(path))), _role(role)))
    return NeuronGroup(
        key=_text(held["key"]),
        size=_number(held["size"]),
        members=tuple(members),
        context=tuple(map(_text, _list(held["context"]))),
        pin=None if pin is None else PinReason(*map(_text, _list(pin))),
        flags=frozenset(map(_text, _list(held["flags"]))),
        first_operation=_number(held["first_operation"]),
    )


def _layout(data: object, depth: int = 0) -> AxisLayout:
    kind, *rest = _list(data)
    if depth > _DEEPEST:
        raise StoredGraphError("depth")
    if kind == "neurons":
        group, size = rest
        return Neurons(_text(group), _number(size))
    if kind == "fixed":
        (size,) = rest
        return Fixed(_number(size))
    if kind == "factors":
        return Factors(tuple(_layout(part, depth + 1) for part in rest))
    number, *parts = rest
    inner = tuple(_layout(part, depth + 1) for part in parts)
    if kind == "choice" and inner:
        return Choice(_number(number), inner)
    if kind != "blocks":
        raise StoredGraphError(f"layout {kind!r:.40}")
    return Blocks(_number(number), inner)


def _check(graph: ModelGraph, shapes: Mapping[str, Sequence[int]]) -> None:
    """Checks that a graph fits a module, and that what it says in two places is the same.

    Raises:
        StoredGraphError: It does not.
    """
    for name, axes in graph.layouts.items():
        if name not in shapes or [layout_size(axis) for axis in axes] != list(shapes[name]):
            raise StoredGraphError(f"shape of {name!r:.80}")
    placed = [*graph.layouts.values(), *graph.values.values()]
    named = {key for axes in placed for axis in axes for key in leaf_groups(axis)}
    contexts = {key for group in graph.groups.values() for key in group.context}
    unknown = (named | contexts | {key for _, _, key in graph.roles}) - graph.groups.keys()
    members = {(slot.parameter, slot.axis, key) for key, group in graph.groups.items() for slot in group.members}
    places = {(name, axis) for name, axes in graph.layouts.items() for axis in range(len(axes))}
    is_placed = members == graph.roles.keys() and {place[:2] for place in members} <= places
    if unknown or not is_placed or not graph.buffers <= graph.layouts.keys():
        raise StoredGraphError("groups")


def _record(data: object) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise StoredGraphError("no mapping")
    return data


def _list(data: object) -> list[Any]:
    if not isinstance(data, list):
        raise StoredGraphError("no list")
    return data


def _text(data: object) -> str:
    if not isinstance(data, str):
        raise StoredGraphError("no text")
    return data


def _number(data: object) -> int:
    if type(data) is not int or not 0 <= data < _LARGEST:
        raise StoredGraphError("no number")
    return data


def _role(data: object) -> str:
    if data not in (IN, OUT):
        raise StoredGraphError("no role")
    return str(data)
