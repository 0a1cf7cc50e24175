"""Dense blocks of a tensor: the views in which every dimension is one neuron group or stays in place.

Whatever products, concatenations and cases describe a parameter, it is a union of such blocks. So reordering,
transport and measures need no Kronecker matrix and know only dense views.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor

from mergekit_ot.graph.layouts import AxisLayout, Blocks, Choice, Factors, Fixed, Neurons, layout_size

# A layout, and the axis of the tensor that it stands on.
_Placed = tuple[AxisLayout, int]


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

    Example:
        >>> import torch
        >>> channels = Factors((Neurons("conv:0", 2), Fixed(3)))
        >>> [block.view.shape for block in blocks_of(torch.zeros(6, 4), [channels, Fixed(4)])]
        [torch.Size([2, 3, 4])]
    """
    return _blocks(tensor, [(layout, axis) for axis, layout in enumerate(layouts)])


def real_blocks_of(tensor: Tensor, layouts: Sequence[AxisLayout]) -> list[Block]:
    """Returns the dense blocks of `tensor`; complex numbers become two real ones on a last dimension, still as views.

    Example:
        >>> import torch
        >>> [block.view.shape for block in real_blocks_of(torch.zeros(3, dtype=torch.cfloat), [Fixed(3)])]
        [torch.Size([3, 2])]
    """
    if not tensor.is_complex():
        return blocks_of(tensor, layouts)
    return blocks_of(torch.view_as_real(tensor), [*layouts, Fixed(2)])


def _blocks(view: Tensor, axes: list[_Placed]) -> list[Block]:
    for place, (layout, _) in enumerate(axes):
        if isinstance(layout, Factors):
            return _unflattened(view, axes, place, layout)
    for place, (layout, _) in enumerate(axes):
        if isinstance(layout, Blocks):
            return _narrowed(view, axes, place, layout)
    dimensions = [
        Dimension(layout.group if isinstance(layout, Neurons) else None, layout_size(layout), axis)
        for layout, axis in axes
    ]
    return [Block(view, tuple(dimensions))]


def _unflattened(view: Tensor, axes: list[_Placed], place: int, layout: Factors) -> list[Block]:
    """Returns the blocks of a view whose axis at `place` is a product: one dimension per factor."""
    factors: list[_Placed] = [(factor, axes[place][1]) for factor in layout.parts]
    sizes = [layout_size(factor) for factor, _ in factors]
    return _blocks(view.unflatten(place, sizes), [*axes[:place], *factors, *axes[place + 1 :]])


def _narrowed(view: Tensor, axes: list[_Placed], place: int, layout: Blocks) -> list[Block]:
    """Returns the blocks of a view whose axis at `place` is a concatenation: those of one part after the other."""
    axis = axes[place][1]
    # A choice looks at the blocks of its own axis first.
    apart = {where for other, where in axes if where != axis and _has_blocks(other, layout.number)}
    blocks: list[Block] = []
    start = 0
    for number, stretch in enumerate(layout.parts):
        size = layout_size(stretch)
        chosen = [
            (other if where in apart else _at_block(other, layout.number, number), where) for other, where in axes
        ]
        chosen[place] = (stretch, axis)
        blocks += _blocks(view.narrow(place, start, size), chosen)
        start += size
    return blocks


def _has_blocks(layout: AxisLayout, number: int) -> bool:
    if isinstance(layout, Neurons | Fixed):
        return False
    if isinstance(layout, Blocks) and layout.number == number:
        return True
    inner = layout.options if isinstance(layout, Choice) else layout.parts
    return any(_has_blocks(inside, number) for inside in inner)


def _at_block(layout: AxisLayout, number: int, block: int) -> AxisLayout:
    if isinstance(layout, Neurons | Fixed):
        return layout
    if isinstance(layout, Choice):
        if layout.number == number:
            return _at_block(layout.options[block], number, block)
        return Choice(layout.number, tuple(_at_block(option, number, block) for option in layout.options))
    chosen = tuple(_at_block(inside, number, block) for inside in layout.parts)
    return Factors(chosen) if isinstance(layout, Factors) else Blocks(layout.number, chosen)


def paired_blocks(
    old: Tensor, old_layouts: Sequence[AxisLayout], new: Tensor, new_layouts: Sequence[AxisLayout]
) -> Iterator[tuple[Block, Block]]:
    """Yields the blocks of two tensors side by side, such as a source's and the fused one's.

    Args:
        old: A tensor.
        old_layouts: One layout per axis of it.
        new: The other tensor; it may differ in the sizes of groups.
        new_layouts: One layout per axis of it, alike up to sizes.

    Example:
        >>> import torch
        >>> wide, narrow = [Neurons("fc:0", 3)], [Neurons("fc:0", 2)]
        >>> ((old, new),) = paired_blocks(torch.zeros(3), wide, torch.zeros(2), narrow)
        >>> old.dimensions[0].size, new.dimensions[0].size
        (3, 2)
    """
    return zip(blocks_of(old, old_layouts), blocks_of(new, new_layouts), strict=True)


def places_of(block: Block, group: str) -> list[int]:
    """Returns the dimensions of a block on which a group stands; two where it refers to itself.

    Example:
        >>> import torch
        >>> (block,) = blocks_of(torch.zeros(3, 4), [Neurons("fc:0", 3), Fixed(4)])
        >>> places_of(block, "fc:0"), places_of(block, "other:0")
        ([0], [])
    """
    return [place for place, dimension in enumerate(block.dimensions) if dimension.group == group]


def group_places(block: Block) -> list[tuple[int, str]]:
    """Returns (dimension, group) for every dimension of a block on which a group stands, in order.

    Example:
        >>> import torch
        >>> (block,) = blocks_of(torch.zeros(3, 4), [Neurons("fc:0", 3), Fixed(4)])
        >>> group_places(block)
        [(0, 'fc:0')]
    """
    return [(place, d.group) for place, d in enumerate(block.dimensions) if d.group is not None]


def rows_along(view: Shaped[Tensor, ...], place: int) -> Shaped[Tensor, "n d"]:
    """Returns a view as one row per index of the dimension `place`.

    Example:
        >>> import torch
        >>> rows_along(torch.zeros(2, 3, 4), 1).shape
        torch.Size([3, 8])
    """
    return view.movedim(place, 0).reshape(view.shape[place], -1)


def spread_along(values: Shaped[Tensor, " n"], place: int, rank: int) -> Shaped[Tensor, ...]:
    """Returns one number per index of the dimension `place` in the shape that broadcasts against a block.

    Args:
        values: The numbers.
        place: The dimension.
        rank: How many dimensions the block has.

    Example:
        >>> import torch
        >>> spread_along(torch.ones(3), 1, 4).shape
        torch.Size([1, 3, 1, 1])
    """
    shape = [1] * rank
    shape[place] = -1
    return values.reshape(shape)


def context_place(dimensions: Sequence[Dimension], place: int, outer: str) -> int:
    """Returns the dimension of a block on which a family's context stands: its own parameter axis goes first."""
    candidates = [other for other, dimension in enumerate(dimensions) if dimension.group == outer]
    near = [other for other in candidates if dimensions[other].axis == dimensions[place].axis]
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
