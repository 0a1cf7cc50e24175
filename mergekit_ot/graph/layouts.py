"""Axis layouts: what stands on one axis of a parameter, and in what role."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

OUT = "OUT"
IN = "IN"


@dataclass(frozen=True)
class Neurons:
    """Leaf: the neurons of a group.

    Example:
        >>> layout_text(Neurons("fc1.weight:0", 8))
        'fc1.weight:0'
    """

    group: str
    size: int


@dataclass(frozen=True)
class Fixed:
    """Leaf: a stretch that always stays where it is.

    Example:
        >>> layout_text(Fixed(3))
        '3!'
    """

    size: int


@dataclass(frozen=True)
class Factors:
    """A row-major index over parts, outermost first.

    Example:
        What a linear layer reads of flattened images: 4 × 4 pixels of each of 8 channels.

        >>> layout_size(Factors((Neurons("conv.weight:0", 8), Fixed(16))))
        128
    """

    parts: tuple[AxisLayout, ...]


@dataclass(frozen=True)
class Blocks:
    """Parts one after the other; `number` names the concatenation for the `Choice` on another axis.

    Example:
        >>> leaf_groups(Blocks(0, (Neurons("left.weight:0", 3), Neurons("right.weight:0", 5))))
        ['left.weight:0', 'right.weight:0']
    """

    number: int
    parts: tuple[AxisLayout, ...]


@dataclass(frozen=True)
class Choice:
    """One option per part of the `Blocks` with the same number.

    Example:
        Which neurons these four are depends on the block that stands on another axis of the tensor:

        >>> layout_size(Choice(0, (Neurons("left.weight:0", 4), Neurons("right.weight:0", 4))))
        4
    """

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
        return math.prod(map(layout_size, layout.parts))
    if isinstance(layout, Blocks):
        return sum(map(layout_size, layout.parts))
    return layout_size(layout.options[0])


def product_layout(factors: Sequence[AxisLayout]) -> AxisLayout:
    """Returns the layout of a product; fixed factors beside each other are one.

    Example:
        >>> product_layout((Fixed(3), Fixed(4)))
        Fixed(size=12)
    """
    merged: list[AxisLayout] = []
    for factor in factors:
        if merged and isinstance(merged[-1], Fixed) and isinstance(factor, Fixed):
            merged[-1] = Fixed(merged[-1].size * factor.size)
        else:
            merged.append(factor)
    return merged[0] if len(merged) == 1 else Factors(tuple(merged))


def fixed_layout(layout: AxisLayout, keys: Collection[str]) -> AxisLayout:
    """Returns a layout in which the neurons of some groups stay where they are.

    Example:
        >>> fixed_layout(Factors((Neurons("conv2.weight:0", 8), Fixed(16))), {"conv2.weight:0"})
        Fixed(size=128)
    """
    if isinstance(layout, Neurons):
        return Fixed(layout.size) if layout.group in keys else layout
    if isinstance(layout, Fixed):
        return layout
    if isinstance(layout, Factors):
        return product_layout([fixed_layout(part, keys) for part in layout.parts])
    if isinstance(layout, Blocks):
        return Blocks(layout.number, tuple(fixed_layout(part, keys) for part in layout.parts))
    options = tuple(fixed_layout(option, keys) for option in layout.options)
    return options[0] if all(isinstance(option, Fixed) for option in options) else Choice(layout.number, options)


def resized_layout(layout: AxisLayout, sizes: Mapping[str, int]) -> AxisLayout:
    """Returns a layout whose groups have other sizes; what stays in place keeps its own.

    Example:
        >>> resized_layout(Factors((Neurons("conv2.weight:0", 8), Fixed(16))), {"conv2.weight:0": 6})
        Factors(parts=(Neurons(group='conv2.weight:0', size=6), Fixed(size=16)))
    """
    if isinstance(layout, Neurons):
        return Neurons(layout.group, sizes[layout.group])
    if isinstance(layout, Fixed):
        return layout
    if isinstance(layout, Factors):
        return Factors(tuple(resized_layout(part, sizes) for part in layout.parts))
    if isinstance(layout, Blocks):
        return Blocks(layout.number, tuple(resized_layout(part, sizes) for part in layout.parts))
    return Choice(layout.number, tuple(resized_layout(option, sizes) for option in layout.options))


def layout_text(layout: AxisLayout) -> str:
    """Returns a layout in the notation of the documentation.

    Example:
        >>> layout_text(Factors((Neurons("conv2.weight:0", 6), Fixed(16))))
        '(conv2.weight:0 × 16!)'
    """
    if isinstance(layout, Neurons):
        return layout.group
    if isinstance(layout, Fixed):
        return f"{layout.size}!"
    if isinstance(layout, Factors):
        return "(" + " × ".join(map(layout_text, layout.parts)) + ")"
    if isinstance(layout, Blocks):
        return "[" + " + ".join(map(layout_text, layout.parts)) + "]"
    return "{" + " | ".join(map(layout_text, layout.options)) + "}"


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
    return list(dict.fromkeys(itertools.chain.from_iterable(map(leaf_groups, inner))))


def shape_free(layout: AxisLayout) -> object:
    """Returns what two layouts share that differ by the sizes of groups alone.

    Example:
        >>> shape_free(Neurons("fc1.weight:0", 8)) == shape_free(Neurons("fc1.weight:0", 6))
        True
    """
    if isinstance(layout, Neurons):
        return layout.group
    if isinstance(layout, Fixed):
        return ("fixed", layout.size)
    if isinstance(layout, Choice):
        return ("choice", tuple(map(shape_free, layout.options)))
    kind = "factors" if isinstance(layout, Factors) else "blocks"
    return (kind, tuple(map(shape_free, layout.parts)))
