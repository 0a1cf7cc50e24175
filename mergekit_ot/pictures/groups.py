"""The picture of a model's neuron groups.

Time runs downwards. A residual stream (a group that the groups inside its blocks read and add to) is a band on the
left; what it holds together stands beside it, one group a row. Families stand inside the group by which they are
indexed. Without a stream the groups stand in layers.
"""

from __future__ import annotations

import itertools
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
# Where more arrows are drawn their labels would cover each other.
_MOST_LABELS = 12


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
        lines = [self.key, self.note, *itertools.chain(*self.inner)]
        return max(90.0, max(text_width(line) for line in lines) + (32 if self.inner else 20))

    @property
    def height(self) -> float:
        return _TITLE + (len(self.inner) * (_INNER + 5) + 5 if self.inner else 0)

    def draw(self, is_stream: bool) -> list[str]:
        middle = self.x + self.width / 2
        elements = [box(self.x, self.y, self.width, self.height, "stream" if is_stream else "")]
        elements.append(text(middle, self.y + 16, self.key))
        elements.append(text(middle, self.y + 29, self.note, is_small=True))
        top = self.y + _TITLE + 2
        for key, note in self.inner:
            elements.append(box(self.x + 8, top, self.width - 16, _INNER, "inner"))
            elements.append(text(middle, top + 13, key))
            elements.append(text(middle, top + 25, note, is_small=True))
            top += _INNER + 5
        return elements


def group_svg(graph: ModelGraph) -> str:
    """Returns an SVG of the free groups: a box per group, an arrow where a parameter reads one and makes another.

    Example:
        >>> import torch
        >>> from mergekit_ot import trace_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> "0.weight:0" in group_svg(trace_model(net, torch.randn(2, 3)))
        True
    """
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
    edges: dict[tuple[str, str], list[str]] = {}
    for before, after, data in graph.group_graph.edges(data=True):
        parameter = data.get("parameter")
        if parameter is not None and owner[before] != owner[after]:
            names = edges.setdefault((owner[before], owner[after]), [])
            if parameter not in names:
                names.append(parameter)
    return edges


def _streams(boxes: dict[str, _Box], edges: Iterable[tuple[str, str]]) -> list[str]:
    """Returns the groups that others both read and add to, the earliest of every cycle."""
    network = nx.DiGraph(list(edges))
    cycles = [cycle for cycle in nx.strongly_connected_components(network) if len(cycle) > 1]
    return [min(cycle, key=lambda key: (-_mutual(network, key, cycle), boxes[key].first, key)) for cycle in cycles]


def _mutual(network: nx.DiGraph, key: str, cycle: set[str]) -> int:
    return sum(network.has_edge(key, other) and network.has_edge(other, key) for other in cycle if other != key)


def _draw_streams(boxes: dict[str, _Box], edges: dict[tuple[str, str], list[str]], streams: list[str]) -> str:
    y = MARGIN
    for drawn in boxes.values():
        drawn.y = y
        y += drawn.height + _GAP
    ends = {key: _end_of(key, boxes, edges) for key in streams}
    right = _place_beside(boxes, _columns(boxes, streams, ends))
    bands = {key: boxes[key].x + min(60.0, boxes[key].width / 2) for key in boxes if key in ends}
    elements: list[str] = []
    for key, middle in bands.items():
        top, height = boxes[key].y, max(ends[key] - boxes[key].y, boxes[key].height)
        elements.append(box(middle - _BAND / 2, top, _BAND, height, "band"))
    loops = 0
    for (before, after), names in edges.items():
        title = f"{before} → {after}: {', '.join(names)}"
        curve, is_loop = _stream_curve(boxes, bands, ends, before, after, loops)
        loops += is_loop
        elements.append(arrow(curve, title, "back" if after in bands and before not in bands else ""))
    for key, drawn in boxes.items():
        elements += drawn.draw(key in bands)
    widest = max([boxes[key].width for key in boxes.keys() - bands.keys()], default=0.0)
    return document(right + widest + MARGIN + 10 * loops, y - _GAP + MARGIN, elements)


def _place_beside(boxes: dict[str, _Box], columns: dict[str, int]) -> float:
    """Puts streams into their columns and the other boxes to the right of them; returns where those begin."""
    titles: dict[int, float] = {}
    for key, column in columns.items():
        titles[column] = max(titles.get(column, 0.0), boxes[key].width)
    left = MARGIN
    lefts: list[float] = []
    for column in range(len(titles)):
        lefts.append(left)
        left += titles[column] + _COLUMN
    right = left + 2 * _COLUMN
    for key, drawn in boxes.items():
        drawn.x = lefts[columns[key]] if key in columns else right
    return right


def _end_of(key: str, boxes: dict[str, _Box], edges: dict[tuple[str, str], list[str]]) -> float:
    """Returns how far down a stream is used: the lower edge of the last group beside it, no further than a handover."""
    beside: set[str] = set()
    beside = beside.union(*(pair for pair in edges if key in pair)) - {key}
    return max(boxes[other].y + min(boxes[other].height, _TITLE) for other in beside)


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
    source, target = boxes[before], boxes[after]
    if before in bands and after in bands:
        is_below = target.y > source.y
        start = min(ends[before], target.y) if is_below else source.y
        end = target.y - 2 if is_below else target.y + target.height
        return f"M{bands[before]:.1f},{start:.1f} L{bands[after]:.1f},{end:.1f}", False
    if before in bands:
        y = target.y + 11
        is_at_title = source.y <= y <= source.y + source.height
        start = source.x + source.width if is_at_title else bands[before] + _BAND / 2
        return f"M{start:.1f},{y:.1f} L{target.x - 2:.1f},{y:.1f}", False
    if after in bands:
        return _curve_into(source, target, bands[after]), False
    x1, x2 = source.x + source.width, target.x + target.width
    y1, y2 = source.y + source.height / 2, target.y + target.height / 2
    side = max(x1, x2) + 14 + 8 * (loops % 6)
    return f"M{x1:.1f},{y1:.1f} C{side:.1f},{y1:.1f} {side:.1f},{y2:.1f} {x2 + 2:.1f},{y2:.1f}", True


def _curve_into(source: _Box, stream: _Box, band: float) -> str:
    """Returns the path of an arrow from a group beside a stream into the stream's band."""
    y = source.y + min(source.height - 8, 27)
    if source.y < stream.y:
        # It is made before the stream begins: down to the stream's title.
        middle = stream.y + stream.height / 2
        x = stream.x + stream.width
        bend = f"{source.x - 24:.1f},{y:.1f} {x + 40:.1f},{middle:.1f}"
        return f"M{source.x:.1f},{y:.1f} C{bend} {x + 2:.1f},{middle:.1f}"
    is_at_title = stream.y <= y <= stream.y + stream.height
    end = stream.x + stream.width + 2 if is_at_title else band + _BAND / 2 + 2
    return f"M{source.x:.1f},{y:.1f} L{end:.1f},{y:.1f}"


def _draw_layers(boxes: dict[str, _Box], edges: dict[tuple[str, str], list[str]]) -> str:
    depth: dict[str, int] = {}
    for key in boxes:
        depth[key] = 1 + max((depth[before] for before, after in edges if after == key and before in depth), default=-1)
    layers: list[list[_Box]] = [[] for _ in range(1 + max(depth.values()))]
    for key, level in depth.items():
        layers[level].append(boxes[key])
    width, height = _place_layers(layers)
    elements: list[str] = []
    for (before, after), names in edges.items():
        elements += _layer_arrow(boxes[before], boxes[after], names, is_labelled=len(edges) <= _MOST_LABELS)
    for drawn in boxes.values():
        elements += drawn.draw(is_stream=False)
    return document(width + 2 * MARGIN + 60, height, elements)


def _place_layers(layers: list[list[_Box]]) -> tuple[float, float]:
    """Puts the boxes of a layer beside each other, in the middle; returns the widest layer and the whole height."""
    widths = [_extent(layer) for layer in layers]
    y = MARGIN
    for layer, width in zip(layers, widths, strict=True):
        x = MARGIN + (max(widths) - width) / 2
        for drawn in layer:
            drawn.x, drawn.y = x, y
            x += drawn.width + _BETWEEN
        y += max(drawn.height for drawn in layer) + _LAYER
    return max(widths), y - _LAYER + MARGIN


def _extent(layer: list[_Box]) -> float:
    return sum(drawn.width for drawn in layer) + _BETWEEN * (len(layer) - 1)


def _layer_arrow(source: _Box, target: _Box, names: list[str], is_labelled: bool) -> list[str]:
    x1, x2 = source.x + source.width / 2, target.x + target.width / 2
    y1, y2 = (source.y + source.height, target.y) if target.y > source.y else (source.y, target.y + target.height)
    bend = (y2 - y1) / 2
    curve = f"M{x1:.1f},{y1:.1f} C{x1:.1f},{y1 + bend:.1f} {x2:.1f},{y2 - bend:.1f} {x2:.1f},{y2 - 2:.1f}"
    elements = [arrow(curve, f"{source.key} → {target.key}: {', '.join(names)}")]
    if is_labelled:
        shown = names[0] + (f" +{len(names) - 1}" if len(names) > 1 else "")
        elements.append(text((x1 + x2) / 2 + 5, (y1 + y2) / 2 + 3, shown, is_small=True, is_middle=False))
    return elements
