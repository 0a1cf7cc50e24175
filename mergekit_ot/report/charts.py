"""The charts of a report, as SVG that takes its colours from the page's theme."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from mergekit_ot.report.markup import Markup, join, tag
from mergekit_ot.scoring.path import BarrierCurve

# t and what was measured there.
_Point = tuple[float, float]
_WIDTH, _HEIGHT = 420.0, 270.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 12.0, 32.0, 28.0
# From where on equal ratios are shown as equal distances.
_LOG_RATIO = 50.0


def bar_chart(bars: Sequence[tuple[str, float, str]], kinds: Sequence[str], title: str, number: str) -> Markup:
    """Returns horizontal bars from zero, each with its name and its value.

    Args:
        bars: Name, length, and the value as text.
        kinds: A class of the style sheet per bar.
        title: What is shown, for readers who do not see it.
        number: Tells this chart from the others of the page.
    """
    row, label, room = 30.0, 108.0, 82.0
    finite = [length for _, length, _ in bars if math.isfinite(length)]
    longest = max(finite, default=0.0) or 1.0
    elements = []
    for place, ((name, length, shown), kind) in enumerate(zip(bars, kinds, strict=True)):
        y = place * row
        # What is not finite fills the row.
        width = (_WIDTH - label - room) * (min(length, longest) / longest if math.isfinite(length) else 1.0)
        elements += [
            tag("text", name, x=f"{label - 8:.1f}", y=f"{y + 19:.1f}", text_anchor="end"),
            tag(
                "rect",
                class_=f"bar {kind}",
                x=f"{label:.1f}",
                y=f"{y + 5:.1f}",
                width=f"{max(width, 1):.1f}",
                height="19",
                rx="2",
            ),
            tag("text", shown, class_="value", x=f"{label + max(width, 1) + 6:.1f}", y=f"{y + 19:.1f}"),
        ]
    return _picture(elements, len(bars) * row + 4, title, number)


def line_chart(curves: Mapping[str, BarrierCurve], panel: str, point: _Point | None, title: str, number: str) -> Markup:
    """Returns one panel of the path between two sources: accuracy or loss over t.

    Args:
        curves: ``naive`` and ``aligned``.
        panel: ``accuracy`` or ``loss``.
        point: t and value of the fused model.
        title: What is shown, for readers who do not see it.
        number: Tells this chart from the others of the page.
    """
    series = {name: _finite(zip(curve["t"], curve[panel] or (), strict=True)) for name, curve in curves.items()}
    fused = _finite([] if point is None else [point])
    axis = _Axis.of([value for _, value in itertools.chain(*series.values(), fused)], panel == "loss")
    elements = [*axis.grid(), *_horizontal()]
    for name, points in series.items():
        elements += _curve(name, points, axis)
    for t, value in fused:
        elements.append(marker("fused", _x(t), axis.y(value), tag("title", f"fused model: {value:.4g}")))
    elements.append(tag("text", axis.label(panel), class_="axis", x="0", y="14"))
    return _picture(elements, _HEIGHT, title, number)


def _finite(points: Iterable[_Point]) -> list[_Point]:
    return [(t, value) for t, value in points if math.isfinite(value)]


def _curve(name: str, points: Sequence[_Point], axis: _Axis) -> list[Markup]:
    """Returns the line through points, and a marker with its numbers at each."""
    places = [(_x(t), axis.y(value)) for t, value in points]
    line = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    elements = [tag("path", class_=f"line {name}", d=line if places else None)]
    for (x, y), (t, value) in zip(places, points, strict=True):
        elements.append(marker(name, x, y, tag("title", f"{name}, t = {t:.2f}: {value:.4g}")))
    return elements


def marker(kind: str, x: float, y: float, inner: Markup | None = None) -> Markup:
    """Returns the marker of a curve: its shape tells it apart where its colour does not."""
    if kind == "naive":
        return tag("circle", inner, class_="spot naive", cx=f"{x:.1f}", cy=f"{y:.1f}", r="3")
    if kind == "aligned":
        return tag("rect", inner, class_="spot aligned", x=f"{x - 3:.1f}", y=f"{y - 3:.1f}", width="6", height="6")
    return tag("path", inner, class_="spot fused", d=f"M{x:.1f} {y - 7:.1f}l7 7-7 7-7-7z")


def sample(kind: str) -> Markup:
    """Returns a piece of a curve for the legend."""
    line = None if kind == "fused" else tag("path", class_=f"line {kind}", d="M0 8H30")
    return tag("svg", line, marker(kind, 15, 8), viewBox="0 0 30 16", width="30", height="16", aria_hidden="true")


class _Axis:
    """The vertical axis of a panel: from where to where, linear or logarithmic, and where its lines are."""

    def __init__(self, low: float, high: float, ticks: Sequence[float], is_log: bool) -> None:
        self.low, self.high, self.ticks, self.is_log = low, high, ticks, is_log

    @classmethod
    def of(cls, values: Sequence[float], is_loss: bool) -> _Axis:
        """Returns the axis on which finite values are seen best."""
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        if is_loss and low > 0 and high / low > _LOG_RATIO:
            return cls._logarithmic(low, high)
        return cls._linear(low, high, is_loss)

    @classmethod
    def _logarithmic(cls, low: float, high: float) -> _Axis:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        step = max(1, (last - first) // 5)
        return cls(float(first), float(last), [10.0**power for power in range(first, last + 1, step)], True)

    @classmethod
    def _linear(cls, low: float, high: float, is_loss: bool) -> _Axis:
        step = _step((high - low) or abs(high) * 0.1 or 1.0)
        # Losses start at zero; accuracies, which lie anywhere up to 100, are shown as near as they need.
        bottom = 0.0 if is_loss and low >= 0 else math.floor(low / step) * step
        if is_loss:
            step = _step((high - bottom) or 1.0)
        top = max(math.ceil(high / step - 1e-9) * step, bottom + step)
        return cls(bottom, top, [bottom + step * place for place in range(round((top - bottom) / step) + 1)], False)

    def y(self, value: float) -> float:
        """Returns how far below the top of the picture a value stands."""
        place = math.log10(value) if self.is_log else value
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - (place - self.low) / (self.high - self.low))

    def grid(self) -> list[Markup]:
        """Returns a line and its number per tick."""
        elements = []
        for tick in self.ticks:
            y = self.y(tick)
            elements.append(tag("path", class_="grid", d=f"M{_LEFT:.1f} {y:.1f}H{_WIDTH - _RIGHT:.1f}"))
            elements.append(tag("text", f"{tick:.4g}", x=f"{_LEFT - 8:.1f}", y=f"{y + 4:.1f}", text_anchor="end"))
        return elements

    def label(self, panel: str) -> str:
        """Returns what the axis shows."""
        if panel == "accuracy":
            return "accuracy (%)"
        return "loss (logarithmic)" if self.is_log else "loss"


def _step(span: float) -> float:
    """Returns a round distance between the lines of an axis that spans so much: 1, 2 or 5 times a power of ten."""
    rough = span / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next((nice * power for nice in (1, 2, 5) if nice * power >= rough * 0.999), 10 * power)


def _x(t: float) -> float:
    return _LEFT + 6 + (_WIDTH - _LEFT - _RIGHT - 12) * t


def _horizontal() -> list[Markup]:
    elements = []
    for t, shown in ((0.0, "source 1"), (0.5, "t = 0.5"), (1.0, "source 2")):
        anchor = {0.0: "start", 0.5: "middle", 1.0: "end"}[t]
        elements.append(tag("text", shown, x=f"{_x(t):.1f}", y=f"{_HEIGHT - _BOTTOM + 18:.1f}", text_anchor=anchor))
    return elements


def _picture(elements: Sequence[Markup], height: float, title: str, number: str) -> Markup:
    return tag(
        "svg",
        tag("title", title, id=f"chart-{number}"),
        join(*elements),
        class_="chart",
        role="img",
        viewBox=f"0 0 {_WIDTH:.0f} {height:.0f}",
        aria_labelledby=f"chart-{number}",
    )
