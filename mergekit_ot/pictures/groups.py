"""The picture of a model's neuron groups.

Time runs downwards. A residual stream (a group that the groups inside its blocks read and add to) is a band on the
left; what it holds together stands beside it, one group a row. Families stand inside the group by which they are
indexed. Without a stream the groups stand in layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import networkx as nx

from mergekit_ot.pictures.svg import MARGIN, arrow, box, document, text, text_width

if TYPE_CHECKING:
    from mergekit_ot.graph.ir import ModelGraph

_TITLE = 36.0
_INNER = 30.0
_GAP = 16.0
_BETWEEN = 26.0
_LAYER = 46.0
_COLUMN = 30.0
_BAND = 7.0


@dataclass
class _Box:
    """A group with the families inside it, and where it is drawn."""

    key: str
    note: str
    first: int
    inner: list[tuple[str, str]] = field(default_factory=list)
    x: float = 0.0
    y: float = 0.0

    @property
    def width(self) -> float:
        lines = [self.key, self.note, *(line for pair in self.inner for line in pair)]
        return max(90.0, max(text_width(line) for line in lines) + (32 if self.inner else 20))

    @property
    def height(self) -> float:
        return _TITLE + (len(self.inner) * (_INNER + 5) + 5 if self.inner else 0)

    def draw(self, is_stream: bool) -> list[str]:
        middle = self.x + self.width / 2
        parts = [box(self.x, self.y, self.width, self.height, "stream" if is_stream else "")]
        parts.append(text(middle, self.y + 16, self.key))
        parts.append(text(middle, self.y + 29, self.note, is_small=True))
        top = self.y + _TITLE + 2
        for key, note in self.inner:
            parts.append(box(self.x + 8, top, self.width - 16, _INNER, "inner"))
            parts.append(text(middle, top + 13, key))
            parts.append(text(middle, top + 25, note, is_small=True))
            top += _INNER + 5
        return parts


def group_svg(graph: ModelGraph) -> str:
    """Returns an SVG of the free groups: a box per group, an arrow where a parameter reads one and makes another."""
    boxes, owner = _boxes(graph)
    if not boxes:
        return document(320, 80, [text(160, 44, "no free neuron group was found")])
    edges = _edges(graph, owner)
    streams = _streams(boxes, edges)
    if streams:
        return _draw_streams(boxes, edges, streams)
    return _draw_layers(boxes, edges)


def _boxes(graph: ModelGraph) -> tuple[dict[str, _Box], dict[str, str]]:
    """Returns the boxes by key, and group → the box that it stands in."""
    free = graph.free_groups
    boxes: dict[str, _Box] = {}
    owner: dict[str, str] = {}
    for key, group in sorted(free.items(), key=lambda item: (len(item[1].context), item[1].first_operation, item[0])):
        outer = next((owner[context] for context in group.context if context in owner), None)
        orders = graph.family_size(key)
        note = f"{group.size} neurons" + (f", {orders} orders" if orders > 1 else "")
        owner[key] = outer or key
        if outer is None:
            boxes[key] = _Box(key, note, group.first_operation)
        else:
            boxes[outer].inner.append((key, note))
            boxes[outer].first = min(boxes[outer].first, group.first_operation)
    return dict(sorted(boxes.items(), key=lambda item: (item[1].first, item[0]))), owner


def _edges(graph: ModelGraph, owner: dict[str, str]) -> dict[tuple[str, str], list[str]]:
    """Returns (box that is read, box that is made) → parameters."""
    found: dict[tuple[str, str], list[str]] = {}
    for before, after, data in graph.group_graph.edges(data=True):
        parameter = data.get("parameter")
        if parameter is not None and owner[before] != owner[after]:
            names = found.setdefault((owner[before], owner[after]), [])
            if parameter not in names:
                names.append(parameter)
    return found


def _streams(boxes: dict[str, _Box], edges: Iterable[tuple[str, str]]) -> list[str]:
    """Returns the groups that others both read and add to, the earliest of every cycle."""
    network = nx.DiGraph(list(edges))
    cycles = [cycle for cycle in nx.strongly_connected_components(network) if len(cycle) > 1]
    return [min(cycle, key=lambda key: (-_mutual(network, key, cycle), boxes[key].first, key)) for cycle in cycles]


def _mutual(network: nx.DiGraph, key: str, cycle: set[str]) -> int:
    return sum(network.has_edge(key, other) and network.has_edge(other, key) for other in cycle if other != key)


def _draw_streams(boxes: dict[str, _Box], edges: dict[tuple[str, str], list[str]], streams: list[str]) -> str:
    y = MARGIN
    for made in boxes.values():
        made.y = y
        y += made.height + _GAP
    ends = {key: _end_of(key, boxes, edges) for key in streams}
    columns = _columns(boxes, streams, ends)
    count = 1 + max(columns.values())
    titles = [max(boxes[key].width for key in streams if columns[key] == c) for c in range(count)]
    lefts = [MARGIN + sum(titles[:c]) + c * _COLUMN for c in range(count)]
    right = lefts[-1] + titles[-1] + 3 * _COLUMN
    parts: list[str] = []
    bands: dict[str, float] = {}
    for key, made in boxes.items():
        made.x = lefts[columns[key]] if key in columns else right
        if key in columns:
            bands[key] = made.x + min(60.0, made.width / 2)
            parts.append(box(bands[key] - _BAND / 2, made.y, _BAND, max(ends[key] - made.y, made.height), "band"))
    loops = 0
    for (before, after), names in edges.items():
        title = f"{before} → {after}: {', '.join(names)}"
        curve, is_loop = _stream_curve(boxes, bands, ends, before, after, loops)
        loops += is_loop
        parts.append(arrow(curve, title, "back" if after in bands and before not in bands else ""))
    for key, made in boxes.items():
        parts += made.draw(key in columns)
    width = right + max((m.width for k, m in boxes.items() if k not in columns), default=0.0) + MARGIN + 10 * loops
    return document(width, y - _GAP + MARGIN, parts)


def _end_of(key: str, boxes: dict[str, _Box], edges: dict[tuple[str, str], list[str]]) -> float:
    """Returns how far down a stream is used: the lower edge of the last group beside it, no further than a handover."""
    beside = [boxes[other] for pair in edges if key in pair for other in pair if other != key]
    return max(min(b.y + b.height, b.y + _TITLE) for b in beside)


def _columns(boxes: dict[str, _Box], streams: list[str], ends: dict[str, float]) -> dict[str, int]:
    """Gives each stream the first column in which no other one runs at the same time."""
    taken: list[float] = []
    columns: dict[str, int] = {}
    for key in sorted(streams, key=lambda k: boxes[k].y):
        top = boxes[key].y
        place = next((c for c, end in enumerate(taken) if end <= top + _TITLE), len(taken))
        taken[place : place + 1] = [ends[key]]
        columns[key] = place
    return columns


def _stream_curve(
    boxes: dict[str, _Box], bands: dict[str, float], ends: dict[str, float], before: str, after: str, loops: int
) -> tuple[str, bool]:
    """Returns the path of an arrow, and whether it runs around the right side."""
    one, other = boxes[before], boxes[after]
    if before in bands and after in bands:
        x1, x2 = bands[before], bands[after]
        start = min(ends[before], other.y) if other.y > one.y else one.y
        return (
            f"M{x1:.1f},{start:.1f} L{x2:.1f},{other.y - 2 if other.y > one.y else other.y + other.height:.1f}",
            False,
        )
    if before in bands:
        y = other.y + 11
        start = one.x + one.width if one.y <= y <= one.y + one.height else bands[before] + _BAND / 2
        return f"M{start:.1f},{y:.1f} L{other.x - 2:.1f},{y:.1f}", False
    if after in bands:
        y = one.y + min(one.height - 8, 27)
        if one.y < other.y:
            # It is made before the stream begins: down to the stream's title.
            middle = other.y + other.height / 2
            x = other.x + other.width
            return (
                f"M{one.x:.1f},{y:.1f} C{one.x - 24:.1f},{y:.1f} {x + 40:.1f},{middle:.1f} {x + 2:.1f},{middle:.1f}",
                False,
            )
        inside = other.y <= y <= other.y + other.height
        end = other.x + other.width + 2 if inside else bands[after] + _BAND / 2 + 2
        return f"M{one.x:.1f},{y:.1f} L{end:.1f},{y:.1f}", False
    x1, x2 = one.x + one.width, other.x + other.width
    y1, y2 = one.y + one.height / 2, other.y + other.height / 2
    side = max(x1, x2) + 14 + 8 * (loops % 6)
    return f"M{x1:.1f},{y1:.1f} C{side:.1f},{y1:.1f} {side:.1f},{y2:.1f} {x2 + 2:.1f},{y2:.1f}", True


def _draw_layers(boxes: dict[str, _Box], edges: dict[tuple[str, str], list[str]]) -> str:
    depth: dict[str, int] = {}
    for key in boxes:
        depth[key] = 1 + max((depth[b] for b, a in edges if a == key and b in depth), default=-1)
    layers = [[boxes[key] for key in boxes if depth[key] == level] for level in range(1 + max(depth.values()))]
    total = max(sum(b.width for b in layer) + _BETWEEN * (len(layer) - 1) for layer in layers)
    y = MARGIN
    for layer in layers:
        x = MARGIN + (total - sum(b.width for b in layer) - _BETWEEN * (len(layer) - 1)) / 2
        for made in layer:
            made.x, made.y = x, y
            x += made.width + _BETWEEN
        y += max(b.height for b in layer) + _LAYER
    parts = []
    for (before, after), names in edges.items():
        one, other = boxes[before], boxes[after]
        x1, x2 = one.x + one.width / 2, other.x + other.width / 2
        y1, y2 = (one.y + one.height, other.y) if other.y > one.y else (one.y, other.y + other.height)
        bend = (y2 - y1) / 2
        curve = f"M{x1:.1f},{y1:.1f} C{x1:.1f},{y1 + bend:.1f} {x2:.1f},{y2 - bend:.1f} {x2:.1f},{y2 - 2:.1f}"
        parts.append(arrow(curve, f"{before} → {after}: {', '.join(names)}"))
        if len(edges) <= 12:
            shown = names[0] + (f" +{len(names) - 1}" if len(names) > 1 else "")
            parts.append(text((x1 + x2) / 2 + 5, (y1 + y2) / 2 + 3, shown, is_small=True, is_middle=False))
    for made in boxes.values():
        parts += made.draw(is_stream=False)
    return document(total + 2 * MARGIN + 60, y - _LAYER + MARGIN, parts)
