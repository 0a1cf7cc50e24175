"""Pictures of axis expressions: every neuron a square, every block and every outer index a frame.

Squares of one colour belong to one atom. Inside a product a family is drawn once per index of its outer factor, in
another shade each time, for it has an order of its own there. Grey squares are pinned, white ones constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_ot.graph.axes import expressions
from mergekit_ot.graph.axes.notation import Notation
from mergekit_ot.pictures.svg import MARGIN, document, text, text_width

# Okabe and Ito's colours and four of Tol's: they stay apart for colour-blind readers.
_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#332288", "#F0E442", "#882255", "#999933"),
)
_PINNED, _CONSTANT, _FRAME = "#bbbbbb", "#ffffff", "#444444"
_CELL = 18.0
_PAD = 3.0
_ROW_GAP = 26.0
_TITLE = 18.0
_OPTION_GAP = 6.0
# How much paler the last index of a family is than the first.
_PALEST = 0.6


@dataclass(frozen=True)
class AxisRow:
    """One axis of one tensor to draw.

    Attributes:
        title: Which axis it is, such as ``qkv.weight, axis 0``.
        label: What it is made of.
    """

    title: str
    label: expressions.Expression


@dataclass(frozen=True)
class _Drawing:
    """A drawn stretch: its elements with the upper left corner at the origin, and its extent."""

    elements: tuple[str, ...]
    width: float
    height: float

    def at(self, x: float, y: float) -> str:
        """Returns the elements moved to a place."""
        return f'<g transform="translate({x:.1f},{y:.1f})">{"".join(self.elements)}</g>'


def axes_svg(rows: Sequence[AxisRow], notation: Notation) -> str:
    """Returns an SVG with an axis per row: its title, what it is made of in writing, and its neurons.

    Args:
        rows: The axes; what they are made of is drawn as it is now.
        notation: Gives atoms their letters, and with them their colours: one for all pictures of a story.

    Example:
        >>> from mergekit_ot.graph.axes.algebra import AxisAlgebra
        >>> axes_svg([AxisRow("bias", AxisAlgebra().atom(3))], Notation()).count("<rect")
        4
    """
    painter = _Painter(notation)
    elements: list[str] = []
    y, widest = MARGIN, 0.0
    for row in rows:
        title = f"{row.title}:  {notation.text(row.label)}"
        drawing = painter.draw(expressions.resolve(row.label), 0.0)
        elements.append(text(MARGIN, y + 10, title, is_middle=False))
        elements.append(drawing.at(MARGIN, y + _TITLE))
        y += _TITLE + drawing.height + _ROW_GAP
        widest = max(widest, drawing.width, text_width(title))
    return document(widest + 2 * MARGIN, y - _ROW_GAP + MARGIN, elements)


class _Painter:
    """Draws expressions, with one colour per letter."""

    def __init__(self, notation: Notation) -> None:
        self.notation = notation

    def draw(self, expression: expressions.Expression, paleness: float) -> _Drawing:
        """Returns the drawing of an expression.

        Args:
            expression: Resolved.
            paleness: From 0 to 1: where among the indices of its outer factor it stands.
        """
        if isinstance(expression, expressions.Atom):
            colour = _PINNED if expression.pin is not None else _paler(self._colour(expression), paleness)
            return _cells(expression.size, colour)
        if isinstance(expression, expressions.Replicated):
            return _cells(expression.size, _CONSTANT)
        if isinstance(expression, expressions.Product):
            return self._product(expression, paleness)
        if isinstance(expression, expressions.Concat):
            return _beside([_framed(self.draw(block, paleness), _FRAME) for block in expression.blocks])
        return self._case(expression, paleness)

    def _product(self, expression: expressions.Product, paleness: float) -> _Drawing:
        outer, inner = expression.factors[0], expressions.Product(expression.factors[1:])
        count = expressions.size_of(outer)
        colours = self._colours_along(outer)
        repeated = []
        for index in range(count):
            drawing = self.draw(expressions.resolve(inner), _PALEST * index / max(count - 1, 1))
            repeated.append(_framed(drawing, _paler(colours[index], paleness)))
        return _beside(repeated)

    def _colours_along(self, expression: expressions.Expression) -> list[str]:
        """Returns the colour of the outermost neuron at every index of an axis."""
        if isinstance(expression, expressions.Atom):
            return [_PINNED if expression.pin is not None else self._colour(expression)] * expression.size
        colours: list[str] = []
        if isinstance(expression, expressions.Concat):
            for block in expression.blocks:
                colours += self._colours_along(block)
        return colours or [_FRAME] * expressions.size_of(expression)

    def _case(self, expression: expressions.Case, paleness: float) -> _Drawing:
        elements: list[str] = []
        y, widest = 0.0, 0.0
        for block, option in enumerate(expression.options):
            drawing = self.draw(option, paleness)
            caption = f"in block {block}"
            elements.append(text(0, y + drawing.height / 2 + 3, caption, is_small=True, is_middle=False))
            elements.append(drawing.at(text_width(caption), y))
            widest = max(widest, text_width(caption) + drawing.width)
            y += drawing.height + _OPTION_GAP
        return _Drawing(tuple(elements), widest, y - _OPTION_GAP)

    def _colour(self, atom: expressions.Atom) -> str:
        return _COLOURS[self.notation.number(atom) % len(_COLOURS)]


def _cells(count: int, colour: str) -> _Drawing:
    elements = tuple(
        _rectangle(index * _CELL + 1, 1, _CELL - 2, _CELL - 2, colour, "#333333") for index in range(count)
    )
    return _Drawing(elements, count * _CELL, _CELL)


def _framed(drawing: _Drawing, colour: str) -> _Drawing:
    width, height = drawing.width + 2 * _PAD, drawing.height + 2 * _PAD
    frame = _rectangle(1, 1, width - 2, height - 2, "none", colour, thickness=2)
    return _Drawing((frame, drawing.at(_PAD, _PAD)), width, height)


def _beside(drawings: Sequence[_Drawing]) -> _Drawing:
    height = max(drawing.height for drawing in drawings)
    elements: list[str] = []
    x = 0.0
    for drawing in drawings:
        elements.append(drawing.at(x, (height - drawing.height) / 2))
        x += drawing.width + 1
    return _Drawing(tuple(elements), x - 1, height)


def _rectangle(x: float, y: float, width: float, height: float, fill: str, line: str, thickness: float = 0.8) -> str:
    style = f"fill:{fill};stroke:{line};stroke-width:{thickness:g}"
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" style="{style}"/>'


def _paler(colour: str, share: float) -> str:
    """Returns a colour mixed with white."""
    channels = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{round(value + share * (255 - value)):02x}" for value in channels)
