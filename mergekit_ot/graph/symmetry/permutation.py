"""The order of neurons: the symmetry that every layer has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from mergekit_ot.graph.blocks import Block
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.symmetry.symmetry import AbstractProof, AbstractSymmetry, Places
from mergekit_ot.graph.symmetry.transformation import Transformation

# Order of the neurons of a group: entry j is the old place of the neuron that comes to place j. A family has one
# row per index of its context, in the new order of the context: shape [*context sizes, size].
Orders = Mapping[str, Int[Tensor, "*context size"]]


class Order(AbstractSymmetry):
    """The neurons of a group may stand in any order; an element is an index, the old place of each neuron.

    Example:
        >>> import torch
        >>> from mergekit_ot import Block
        >>> element = Order().draw(5, torch.Generator().manual_seed(0))
        >>> sorted(element.tolist())
        [0, 1, 2, 3, 4]
        >>> rows = Block(torch.arange(10).reshape(5, 2), ())
        >>> Order().act(rows, 0, torch.tensor([4, 3, 2, 1, 0]), 1)[:, 0].tolist()
        [8, 6, 4, 2, 0]
    """

    name: ClassVar[str] = "order"
    is_traced: ClassVar[bool] = True

    def find(self, graph: ModelGraph, proof: AbstractProof) -> Mapping[str, Places]:
        """Returns all free groups: that is what the trace claims."""
        return order_places(graph, graph.free_groups)

    def draw(self, size: int, generator: torch.Generator) -> Int[Tensor, " size"]:
        """Returns a random order that is not the identity."""
        while True:
            order = torch.randperm(size, generator=generator)
            if size < 2 or not torch.equal(order, torch.arange(size)):
                return order

    def act(self, block: Block, place: int, element: Int[Tensor, " size"], power: int) -> Shaped[Tensor, "*dimensions"]:
        """Returns the block with its neurons in the order of `element`, whoever makes or reads them."""
        return block.view.index_select(place, element)


def order_places(graph: ModelGraph, keys: Iterable[str]) -> dict[str, Places]:
    """Returns where an order acts, for some groups: wherever they stand."""
    return {key: dict.fromkeys(graph.groups[key].places, (1,)) for key in keys}


def reorder_state(state: Mapping[str, Tensor], graph: ModelGraph, orders: Orders) -> dict[str, Tensor]:
    """Returns the state with every neuron group in its new order; the model computes the same function.

    Args:
        state: All parameters and buffers, further names of tied parameters included.
        graph: The model's graph.
        orders: New order per group; a group left out stays as it is.
    """
    return Transformation(Order(), graph, order_places(graph, orders), orders).of_state(state)


def random_orders(graph: ModelGraph, generator: torch.Generator) -> dict[str, Tensor]:
    """Returns a random order for every free group and for every member of a family, none the identity."""
    places = order_places(graph, graph.free_groups)
    return dict(Transformation.random(Order(), graph, places, generator).elements)
