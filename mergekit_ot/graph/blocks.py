"""Dense blocks of a tensor: the views in which every dimension is one neuron group or stays in place.

Whatever products, concatenations and cases describe a parameter, it is a union of such blocks. So reordering,
transport and measures need no Kronecker matrix and know only dense views.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mergekit_ot.graph.ir import AxisLayout, Blocks, Choice, Factors, Fixed, ModelGraph, Neurons, layout_size

# Order of the neurons of a group: entry j is the old place of the neuron that comes to place j. A family has one
# row per index of its context, in the new order of the context: shape [*context sizes, size].
Orders = Mapping[str, Int[Tensor, "*context size"]]


@dataclass(frozen=True)
class Dimension:
    """One dimension of a block: its group (None where it stays in place), size, and the parameter axis it is on."""

    group: str | None
    size: int
    axis: int


@dataclass(frozen=True)
class Block:
    """A view of a tensor and what its dimensions are."""

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


def reorder(tensor: Tensor, layouts: Sequence[AxisLayout], graph: ModelGraph, orders: Orders) -> Tensor:
    """Returns a copy of `tensor` with the neurons of the groups in `orders` moved to their new places."""
    result = tensor.clone()
    for old, new in zip(blocks_of(tensor, layouts), blocks_of(result, layouts), strict=True):
        view = old.view
        held = [(place, d.group) for place, d in enumerate(old.dimensions) if d.group is not None and d.group in orders]
        for place, group in sorted(held, key=lambda item: len(graph.groups[item[1]].context)):
            context = graph.groups[group].context
            if not context:
                view = view.index_select(place, orders[group])
                continue
            where = [context_place(old.dimensions, place, outer) for outer in context]
            view = torch.take_along_dim(view, _aligned(orders[group], where, place, view.ndim), place)
        new.view.copy_(view)
    return result


def context_place(dimensions: Sequence[Dimension], place: int, outer: str) -> int:
    """Returns the dimension of a block on which a family's context stands: its own parameter axis goes first."""
    candidates = [d for d, dimension in enumerate(dimensions) if dimension.group == outer]
    near = [d for d in candidates if dimensions[d].axis == dimensions[place].axis]
    return (near or candidates)[0]


def _aligned(order: Tensor, context: list[int], place: int, rank: int) -> Tensor:
    """Returns the order of a family as an index that broadcasts against a block."""
    where = [*context, place]
    by_place = sorted(range(len(where)), key=where.__getitem__)
    shape = [1] * rank
    for source in by_place:
        shape[where[source]] = order.shape[source]
    return order.permute(by_place).reshape(shape)


def reorder_state(state: Mapping[str, Tensor], graph: ModelGraph, orders: Orders) -> dict[str, Tensor]:
    """Returns the state with every neuron group in its new order; the model computes the same function.

    Args:
        state: All parameters and buffers, further names of tied parameters included.
        graph: The model's graph.
        orders: New order per group; a group left out stays as it is.
    """
    moved: dict[str, Tensor] = {}
    for name, tensor in state.items():
        described = graph.aliases.get(name, name)
        if described in graph.layouts:
            moved[name] = reorder(tensor, graph.layouts[described], graph, orders)
        else:
            moved[name] = tensor.clone()
    return moved


def random_orders(graph: ModelGraph, generator: torch.Generator) -> dict[str, Tensor]:
    """Returns a random order for every free group and for every member of a family, none the identity."""
    orders = {}
    for key, group in graph.free_groups.items():
        count = graph.family_size(key)
        rows = [_shuffled(group.size, generator) for _ in range(count)]
        context = [graph.groups[outer].size for outer in group.context]
        orders[key] = torch.stack(rows).reshape(*context, group.size)
    return orders


def _shuffled(size: int, generator: torch.Generator) -> Tensor:
    while True:
        order = torch.randperm(size, generator=generator)
        if size < 2 or not torch.equal(order, torch.arange(size)):
            return order
