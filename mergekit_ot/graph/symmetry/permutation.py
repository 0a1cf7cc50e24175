"""The order of neurons: the symmetry that every layer has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from mergekit_ot.graph.blocks import blocks_of, context_place
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.layouts import AxisLayout

# Order of the neurons of a group: entry j is the old place of the neuron that comes to place j. A family has one
# row per index of its context, in the new order of the context: shape [*context sizes, size].
Orders = Mapping[str, Int[Tensor, "*context size"]]


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
