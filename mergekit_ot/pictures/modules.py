"""The picture of a model's modules: what calls what, as data flow, whichever front end captured it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import networkx as nx

from mergekit_ot.pictures.svg import MARGIN, arrow, box, document, text, text_width

if TYPE_CHECKING:
    from mergekit_ot.graph.ir import ModelGraph

_MOST = 60
_HEIGHT = 34.0
_ROW = 60.0
_GAP = 22.0
_HELPERS = ("<built-in function getitem>", "_assert_tensor_metadata")


def module_svg(graph: ModelGraph) -> str:
    """Returns an SVG of the modules and the operations between them, from the inputs down to the outputs.

    Deep modules are drawn as one box where there would be too many boxes otherwise.

    Example:
        >>> import torch
        >>> from mergekit_ot import trace_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> module_svg(trace_model(net, torch.randn(2, 3))).count("linear")
        2
    """
    flow = module_flow(graph)
    if not flow:
        return document(320, 80, [text(160, 44, "no operation was found")])
    level: dict[str, int] = {}
    for key in nx.topological_sort(flow):
        level[key] = 1 + max((level[before] for before in flow.predecessors(key)), default=-1)
    widths: dict[str, float] = {}
    for key, data in flow.nodes(data=True):
        widths[key] = max(70.0, text_width(data["title"]), text_width(data["note"])) + 18
    places, total = _places(level, widths)
    elements = [_flow_arrow(places, widths, before, after, level) for before, after in flow.edges]
    for key, (x, y) in places.items():
        data = flow.nodes[key]
        elements.append(box(x, y, widths[key], _HEIGHT, "" if data["is_module"] else "plain"))
        elements.append(text(x + widths[key] / 2, y + (15 if data["note"] else 21), data["title"]))
        elements.append(text(x + widths[key] / 2, y + 27, data["note"], is_small=True))
    height = 2 * MARGIN + (1 + max(level.values())) * _ROW - (_ROW - _HEIGHT)
    return document(total + 2 * MARGIN + 70, height, elements)


def _places(level: dict[str, int], widths: dict[str, float]) -> tuple[dict[str, tuple[float, float]], float]:
    """Returns where the boxes stand, a row per level with its boxes in the middle, and the widest row."""
    rows: list[list[str]] = [[] for _ in range(1 + max(level.values()))]
    for key, depth in level.items():
        rows[depth].append(key)
    extents = [sum(map(widths.__getitem__, row)) + _GAP * (len(row) - 1) for row in rows]
    places: dict[str, tuple[float, float]] = {}
    for depth, row in enumerate(rows):
        x = MARGIN + (max(extents) - extents[depth]) / 2
        for key in row:
            places[key] = x, MARGIN + depth * _ROW
            x += widths[key] + _GAP
    return places, max(extents)


def _flow_arrow(
    places: dict[str, tuple[float, float]], widths: dict[str, float], before: str, after: str, level: dict[str, int]
) -> str:
    (x1, y1), (x2, y2) = places[before], places[after]
    if level[after] == level[before] + 1:
        start, end = x1 + widths[before] / 2, x2 + widths[after] / 2
        bend = (y2 - y1 - _HEIGHT) / 2
        top = y1 + _HEIGHT
        curve = f"M{start:.1f},{top:.1f} C{start:.1f},{top + bend:.1f} {end:.1f},{y2 - bend:.1f} {end:.1f},{y2 - 2:.1f}"
    else:
        # A skip: around the right side of what lies between.
        start, end = x1 + widths[before], x2 + widths[after]
        side = max(start, end) + 26 + 4 * min(level[after] - level[before], 10)
        from_y, to_y = y1 + _HEIGHT / 2, y2 + _HEIGHT / 2
        curve = f"M{start:.1f},{from_y:.1f} C{side:.1f},{from_y:.1f} {side:.1f},{to_y:.1f} {end + 2:.1f},{to_y:.1f}"
    return arrow(curve, f"{before} → {after}")


def module_flow(graph: ModelGraph) -> nx.DiGraph:
    """Returns the modules and the operations that stand in none, with an edge where data go from one to the other."""
    operations = graph.operations
    calls = [name for name, data in operations.nodes(data=True) if data["kind"] == "call_function"]
    deepest = max((operations.nodes[name]["module_path"].count(".") + 1 for name in calls), default=1)
    flow = nx.DiGraph()
    for depth in range(deepest, 0, -1):
        flow = _flow_at(operations, calls, depth)
        if len(flow) <= _MOST:
            break
    return flow


def _flow_at(operations: nx.DiGraph, calls: list[str], depth: int) -> nx.DiGraph:
    """Returns the flow with module paths cut at a depth; a module that is called twice has two boxes."""
    flow = nx.DiGraph()
    owner = _owners(operations, calls, depth)
    for name in calls:
        key = owner[name]
        path = key.rpartition("#")[0] if operations.nodes[name]["module_path"] else ""
        operation = operations.nodes[name]["operation"].removeprefix("aten.").split(".")[0]
        if key not in flow:
            flow.add_node(key, title=path or operation, note="", is_module=bool(path), operations=[])
        flow.nodes[key]["operations"].append(operation)
        for used in operations.predecessors(name):
            if owner.get(used, key) != key:
                flow.add_edge(owner[used], key)
    for _, data in flow.nodes(data=True):
        data["note"] = _note(data["operations"]) if data["is_module"] else ""
    flow.remove_nodes_from([key for key, data in flow.nodes(data=True) if data["title"] in _HELPERS])
    return flow


def _note(operations: list[str]) -> str:
    shown = [operation for operation in dict.fromkeys(operations) if operation not in _HELPERS]
    return ", ".join(shown[:3]) + (" …" if len(shown) > 3 else "")


def _owners(operations: nx.DiGraph, calls: list[str], depth: int) -> dict[str, str]:
    """Returns operation → the box that it belongs to: the calls of a module in a row, or itself where it is in none."""
    owner: dict[str, str] = {}
    last, number = "", 0
    for name in calls:
        path = ".".join(operations.nodes[name]["module_path"].split(".")[:depth])
        if not path or path != last:
            number += 1
        last = path
        owner[name] = f"{path or name}#{number}"
    return owner
