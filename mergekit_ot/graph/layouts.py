"""Axis layouts: what stands on one axis of a parameter, and in what role."""

from __future__ import annotations

from dataclasses import dataclass

OUT = "OUT"


IN = "IN"


@dataclass(frozen=True)
class Neurons:
    """Leaf: the neurons of a group."""

    group: str
    size: int


@dataclass(frozen=True)
class Fixed:
    """Leaf: a stretch that always stays where it is."""

    size: int


@dataclass(frozen=True)
class Factors:
    """A row-major index over parts, outermost first."""

    parts: tuple[AxisLayout, ...]


@dataclass(frozen=True)
class Blocks:
    """Parts one after the other; `number` names the concatenation for the `Choice` on another axis."""

    number: int
    parts: tuple[AxisLayout, ...]


@dataclass(frozen=True)
class Choice:
    """One option per part of the `Blocks` with the same number."""

    number: int
    options: tuple[AxisLayout, ...]


AxisLayout = Neurons | Fixed | Factors | Blocks | Choice


def layout_size(layout: AxisLayout) -> int:
    """Returns the number of indices along an axis of this layout.

    Example:
        >>> layout_size(Factors((Neurons("conv2.weight:0", 8), Fixed(16))))
        128
    """
    if isinstance(layout, Neurons | Fixed):
        return layout.size
    if isinstance(layout, Factors):
        size = 1
        for part in layout.parts:
            size *= layout_size(part)
        return size
    if isinstance(layout, Blocks):
        return sum(layout_size(part) for part in layout.parts)
    return layout_size(layout.options[0])


def layout_text(layout: AxisLayout) -> str:
    """Returns a layout in the notation of the documentation, such as ``(conv2.weight:0 × 16!)``."""
    if isinstance(layout, Neurons):
        return layout.group
    if isinstance(layout, Fixed):
        return f"{layout.size}!"
    if isinstance(layout, Factors):
        return "(" + " × ".join(layout_text(part) for part in layout.parts) + ")"
    inner = layout.parts if isinstance(layout, Blocks) else layout.options
    text = (" + " if isinstance(layout, Blocks) else " | ").join(layout_text(part) for part in inner)
    return f"[{text}]" if isinstance(layout, Blocks) else "{" + text + "}"


def leaf_groups(layout: AxisLayout) -> list[str]:
    """Returns the keys of the groups that stand in a layout, in order, each once.

    Example:
        >>> leaf_groups(Factors((Neurons("conv2.weight:0", 8), Fixed(16))))
        ['conv2.weight:0']
    """
    if isinstance(layout, Neurons):
        return [layout.group]
    if isinstance(layout, Fixed):
        return []
    inner = layout.options if isinstance(layout, Choice) else layout.parts
    return list(dict.fromkeys(key for part in inner for key in leaf_groups(part)))


def _shape_free(layout: AxisLayout) -> object:
    if isinstance(layout, Neurons):
        return layout.group
    if isinstance(layout, Fixed):
        return ("fixed", layout.size)
    if isinstance(layout, Choice):
        return ("choice", tuple(_shape_free(option) for option in layout.options))
    kind = "factors" if isinstance(layout, Factors) else "blocks"
    return (kind, tuple(_shape_free(part) for part in layout.parts))
