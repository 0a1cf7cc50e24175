"""Dense blocks of a tensor: the views in which every dimension is one neuron group or stays in place.

Whatever products, concatenations and cases describe a parameter, it is a union of such blocks. So reordering,
transport and measures need no Kronecker matrix and know only dense views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mergekit_ot.graph.layouts import AxisLayout, Blocks, Choice, Factors, Fixed, Neurons, layout_size


@dataclass(frozen=True)
class Dimension:
    """One dimension of a block: its group (None where it stays in place), size, and the parameter axis it is on."""

    group: str | None
    size: int
    axis: int


@dataclass(frozen=True)
class Block:
    """A view of a tensor and what its dimensions are.

    Attributes:
        view: Numbers of the tensor, to be read or written in place.
        dimensions: One per dimension of the view.

    Example:
        >>> import torch
        >>> from mergekit_ot.graph.layouts import Fixed, Neurons
        >>> (block,) = blocks_of(torch.zeros(3, 4), [Neurons("0.weight:0", 3), Fixed(4)])
        >>> [(dimension.group, dimension.size) for dimension in block.dimensions]
        [('0.weight:0', 3), (None, 4)]
    """

    view: Tensor
    dimensions: tuple[Dimension, ...]


def blocks_of(tensor: Tensor, layouts: Sequence[AxisLayout]) -> list[Block]:
    """Returns the dense blocks of `tensor`, as views; together they hold each of its entries once.

    Args:
        tensor: Shape given by `layouts`.
        layouts: One layout per axis.
    """
    return _blocks(tensor, [(layout, axis) for axis, layout in enumerate(layouts)])


def _blocks(view: Tensor, axes: list[tuple[AxisLayout, int]]) -> list[Block]:
    for place, (layout, axis) in enumerate(axes):
        if isinstance(layout, Factors):
            sizes = [layout_size(part) for part in layout.parts]
            parts = [(part, axis) for part in layout.parts]
            return _blocks(view.unflatten(place, sizes), [*axes[:place], *parts, *axes[place + 1 :]])
    for place, (layout, axis) in enumerate(axes):
        if isinstance(layout, Blocks):
            found: list[Block] = []
            start = 0
            # A choice looks at the blocks of its own axis first.
            apart = {where for other, where in axes if where != axis and _has_blocks(other, layout.number)}
            for number, part in enumerate(layout.parts):
                size = layout_size(part)
                rest = [
                    (other if where in apart else _at_block(other, layout.number, number), where)
                    for other, where in axes
                ]
                rest[place] = (part, axis)
                found += _blocks(view.narrow(place, start, size), rest)
                start += size
            return found
    dimensions = [
        Dimension(layout.group if isinstance(layout, Neurons) else None, layout_size(layout), axis)
        for layout, axis in axes
    ]
    return [Block(view, tuple(dimensions))]


def _has_blocks(layout: AxisLayout, number: int) -> bool:
    if isinstance(layout, Neurons | Fixed):
        return False
    if isinstance(layout, Blocks) and layout.number == number:
        return True
    inner = layout.options if isinstance(layout, Choice) else layout.parts
    return any(_has_blocks(part, number) for part in inner)


def _at_block(layout: AxisLayout, number: int, block: int) -> AxisLayout:
    if isinstance(layout, Choice):
        if layout.number == number:
            return _at_block(layout.options[block], number, block)
        return Choice(layout.number, tuple(_at_block(option, number, block) for option in layout.options))
    if isinstance(layout, Factors):
        return Factors(tuple(_at_block(part, number, block) for part in layout.parts))
    if isinstance(layout, Blocks):
        return Blocks(layout.number, tuple(_at_block(part, number, block) for part in layout.parts))
    return layout


def context_place(dimensions: Sequence[Dimension], place: int, outer: str) -> int:
    """Returns the dimension of a block on which a family's context stands: its own parameter axis goes first."""
    candidates = [d for d, dimension in enumerate(dimensions) if dimension.group == outer]
    near = [d for d in candidates if dimensions[d].axis == dimensions[place].axis]
    return (near or candidates)[0]


def gate_dimension(block: Block, place: int, answers: Sequence[object]) -> int | None:
    """Returns the dimension of the gates that stand beside a group on its axis, None where one answer holds for all."""
    if len(answers) == 1:
        return None
    axis = block.dimensions[place].axis
    return next(
        other
        for other, d in enumerate(block.dimensions)
        if d.axis == axis and d.group is None and d.size == len(answers)
    )
