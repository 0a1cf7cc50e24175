"""A model graph's neuron groups as records, as a Graphviz file, and as SVG drawn without any external program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import networkx as nx

if TYPE_CHECKING:
    from mergekit_ot.graph.ir import ModelGraph

_CHARACTER = 6.6
_HEIGHT = 40
_ROW = 84
_GAP = 28
_MARGIN = 24
_STYLE = (
    "text{font-family:monospace;font-size:11px;fill:#1a1a1a}text.small{font-size:9px;fill:#666}"
    "rect{fill:#eaf2fb;stroke:#0072B2;stroke-width:1.2}path{fill:none;stroke:#555;stroke-width:1.2}"
    "path.back{stroke:#c8c8c8;stroke-dasharray:4 3}"
)
_LABELLED_EDGES = 12


def group_svg(graph: ModelGraph) -> str:
    """Returns an SVG of the free groups in plan order: a box per group, an arrow per parameter between two."""
    network = graph.group_graph
    layers = _layers(network)
    boxes, width = _boxes(network, layers)
    if not boxes:
        return _document(320, 80, [f'<text x="{_MARGIN}" y="44">no free neuron group was found</text>'])
    parts = []
    edges = _edges(network)
    # Names on many arrows cover each other; they stay readable as tooltips.
    is_labelled = len(edges) <= _LABELLED_EDGES
    # What leads back into a residual stream goes first, so that the order of solving lies on top of it.
    for before, after, parameters in sorted(edges, key=lambda edge: boxes[edge[1]][1] > boxes[edge[0]][1]):
        parts.append(_arrow(boxes, before, after, parameters, is_labelled))
    for key, (x, y, box_width) in boxes.items():
        size = f"{network.nodes[key]['size']} neurons"
        middle = x + box_width / 2
        parts.append(f'<rect x="{x:.1f}" y="{y}" width="{box_width:.1f}" height="{_HEIGHT}" rx="6"/>')
        parts.append(f'<text x="{middle:.1f}" y="{y + 17}" text-anchor="middle">{escape(key)}</text>')
        parts.append(f'<text class="small" x="{middle:.1f}" y="{y + 31}" text-anchor="middle">{size}</text>')
    return _document(width, 2 * _MARGIN + len(layers) * _ROW - (_ROW - _HEIGHT), parts)


def group_rows(graph: ModelGraph) -> list[dict[str, Any]]:
    """Returns one record per neuron group: its size, where it stands, and why it may not be reordered."""
    return [
        {
            "name": key,
            "size": group.size,
            "orders": graph.family_size(key) if group.is_free else 0,
            "status": "pinned" if group.pin is not None else "free" if group.is_free else "single neuron",
            "members": [f"{slot.parameter}:{slot.axis} {slot.role}" for slot in group.members],
            "flags": sorted(group.flags),
            "why": None if group.pin is None else str(group.pin),
        }
        for key, group in graph.groups.items()
    ]


def group_dot(graph: ModelGraph) -> str:
    """Returns the free groups in Graphviz' language: an edge per parameter that reads one and makes another."""
    network = graph.group_graph
    lines = ["digraph groups {", "  node [shape=box, style=rounded, fontname=monospace];"]
    for key, data in network.nodes(data=True):
        label = f"{key}\\n{data['size']} neurons"
        lines.append(f"  {_quoted(key)} [label={_quoted(label)}];")
    for before, after, parameters in _edges(network):
        lines.append(f"  {_quoted(before)} -> {_quoted(after)} [label={_quoted(', '.join(parameters))}];")
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


def _layers(network: nx.MultiDiGraph) -> list[list[str]]:
    """Groups by the longest way to them, in the order in which operations make them; what leads back is left out."""
    order = sorted(network, key=lambda key: (network.nodes[key].get("first", 0), key))
    depth: dict[str, int] = {}
    for key in order:
        depth[key] = 1 + max((depth[before] for before in network.predecessors(key) if before in depth), default=-1)
    layers: list[list[str]] = [[] for _ in range(1 + max(depth.values(), default=-1))]
    for key in order:
        layers[depth[key]].append(key)
    return layers


def _boxes(network: nx.MultiDiGraph, layers: list[list[str]]) -> tuple[dict[str, tuple[float, int, float]], float]:
    widths = {key: max(90.0, len(key) * _CHARACTER + 20) for layer in layers for key in layer}
    rows = [sum(widths[key] for key in layer) + _GAP * (len(layer) - 1) for layer in layers]
    total = max(rows, default=0.0) + 2 * _MARGIN + 60
    boxes: dict[str, tuple[float, int, float]] = {}
    for level, (layer, row) in enumerate(zip(layers, rows, strict=True)):
        x = (total - row) / 2
        for key in layer:
            boxes[key] = (x, _MARGIN + level * _ROW, widths[key])
            x += widths[key] + _GAP
    return boxes, total


def _edges(network: nx.MultiDiGraph) -> list[tuple[str, str, list[str]]]:
    found: dict[tuple[str, str], list[str]] = {}
    for before, after, data in network.edges(data=True):
        found.setdefault((before, after), []).append(data.get("parameter") or "family")
    return [(before, after, sorted(set(names))) for (before, after), names in sorted(found.items())]


def _arrow(
    boxes: dict[str, tuple[float, int, float]], before: str, after: str, parameters: list[str], is_labelled: bool
) -> str:
    (x1, y1, w1), (x2, y2, w2) = boxes[before], boxes[after]
    title = f"<title>{escape(', '.join(parameters))}</title>"
    if before == after:
        right, middle = x1 + w1, y1 + _HEIGHT / 2
        curve = f"M{right:.1f},{middle - 9:.1f} c26,-14 26,32 0,18"
    elif y2 > y1:
        start, end, top, bottom = x1 + w1 / 2, x2 + w2 / 2, y1 + _HEIGHT, y2
        bend = (bottom - top) / 2
        curve = f"M{start:.1f},{top} C{start:.1f},{top + bend:.1f} {end:.1f},{bottom - bend:.1f} {end:.1f},{bottom - 2}"
    else:
        # Against the order, as into a residual stream: around the right side.
        start, end, from_y, to_y = x1 + w1, x2 + w2, y1 + _HEIGHT / 2, y2 + _HEIGHT / 2
        curve = f"M{start:.1f},{from_y} C{start + 40:.1f},{from_y - 20} {end + 60:.1f},{to_y + 20} {end + 2:.1f},{to_y}"
    label = ""
    if is_labelled and y2 == y1 + _ROW and before != after:
        shown = parameters[0] + (f" +{len(parameters) - 1}" if len(parameters) > 1 else "")
        middle_x, middle_y = (x1 + w1 / 2 + x2 + w2 / 2) / 2 + 5, (y1 + _HEIGHT + y2) / 2 + 3
        label = f'<text class="small" x="{middle_x:.1f}" y="{middle_y:.1f}">{escape(shown)}</text>'
    kind = ' class="back"' if y2 <= y1 and before != after else ""
    return f'<g><path{kind} d="{curve}" marker-end="url(#head)">{title}</path>{label}</g>'


def _document(width: float, height: float, parts: list[str]) -> str:
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" style="fill:#888;stroke:none"/></marker></defs>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}"><style>{_STYLE}</style>{head}'
        f'<rect x="0" y="0" width="100%" height="100%" style="fill:white;stroke:none"/>{"".join(parts)}</svg>\n'
    )
