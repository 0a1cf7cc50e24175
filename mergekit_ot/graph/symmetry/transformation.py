"""Elements of a symmetry done to the tensors of a model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Shaped
from torch import Tensor

from mergekit_ot.graph.blocks import Block, context_place, gate_dimension, group_places, paired_blocks
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.layouts import AxisLayout
from mergekit_ot.graph.symmetry.symmetry import AbstractSymmetry, Places

# Group -> an element of its size; a family has one per index of its context, in the new order of the context: its
# first axes are those of the context.
Elements = Mapping[str, Shaped[Tensor, "..."]]


@dataclass(frozen=True)
class Transformation:
    """An element of a symmetry for each of several groups, and the numbers that it acts on.

    Attributes:
        symmetry: Whose elements these are.
        graph: The model's graph.
        places: Group → where its element acts.
        elements: Group → the element, stacked over the context of a family.
    """

    symmetry: AbstractSymmetry
    graph: ModelGraph
    places: Mapping[str, Places]
    elements: Elements

    @classmethod
    def random(
        cls, symmetry: AbstractSymmetry, graph: ModelGraph, places: Mapping[str, Places], generator: torch.Generator
    ) -> Transformation:
        """Returns a random element for every group in `places`, and for every member of a family."""
        elements = {}
        for key in places:
            group = graph.groups[key]
            rows = torch.stack([symmetry.draw(group.size, generator) for _ in range(graph.family_size(key))])
            context = [graph.groups[outer].size for outer in group.context]
            elements[key] = rows.reshape(*context, *rows.shape[1:])
        return cls(symmetry, graph, places, elements)

    def only(self, keys: Collection[str]) -> Transformation:
        """Returns the transformation of these groups alone."""
        return replace(self, elements={key: element for key, element in self.elements.items() if key in keys})

    def of_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the state of a model, further names of tied parameters included, with every group transformed."""
        moved: dict[str, Tensor] = {}
        for name, tensor in state.items():
            described = self.graph.aliases.get(name, name)
            if described in self.graph.layouts:
                moved[name] = self.of_tensor(tensor, described, self.graph.layouts[described])
            else:
                moved[name] = tensor.clone()
        return moved

    def of_tensor(self, tensor: Tensor, name: str, layouts: Sequence[AxisLayout]) -> Tensor:
        """Returns a copy of a parameter with the groups in its layouts transformed."""
        result = tensor.clone()
        for old, new in paired_blocks(tensor, layouts, result, layouts):
            new.view.copy_(self._of_block(old, name))
        return result

    def _of_block(self, block: Block, name: str) -> Tensor:
        for place, key, powers in self._acting(block, name):
            context = [context_place(block.dimensions, place, outer) for outer in self.graph.groups[key].context]
            block = Block(self._with_gates(block, place, self.elements[key], powers, context), block.dimensions)
        return block.view

    def _acting(self, block: Block, name: str) -> Iterable[tuple[int, str, tuple[int, ...]]]:
        """Returns (dimension, group, powers) of what acts on a block, the context of a family before the family."""
        acting = []
        for place, key in group_places(block):
            if key in self.elements:
                powers = self.places[key].get((name, block.dimensions[place].axis), (0,))
                acting.append((place, key, powers))
        return sorted(acting, key=lambda entry: len(self.graph.groups[entry[1]].context))

    def _with_gates(
        self, block: Block, place: int, element: Tensor, powers: tuple[int, ...], context: Sequence[int]
    ) -> Tensor:
        gates = gate_dimension(block, place, powers)
        if gates is None:
            return self._act(block, place, element, powers[0], context)
        places = _without([place, *context], gates)
        slices = [
            self._act(_cut(block, gates, gate), places[0], element, power, places[1:])
            for gate, power in enumerate(powers)
        ]
        return torch.stack(slices, gates)

    def _act(self, block: Block, place: int, element: Tensor, power: int, context: Sequence[int]) -> Tensor:
        if power == 0:
            return block.view
        if not context:
            return self.symmetry.act(block, place, element, power)
        places = _without([place, *context[1:]], context[0])
        slices = [
            self._act(_cut(block, context[0], index), places[0], member, power, places[1:])
            for index, member in enumerate(element)
        ]
        return torch.stack(slices, context[0])


def _cut(block: Block, dimension: int, index: int) -> Block:
    """Returns a block at one index of a dimension, without it."""
    dimensions = [kept for place, kept in enumerate(block.dimensions) if place != dimension]
    return Block(block.view.select(dimension, index), tuple(dimensions))


def _without(places: Sequence[int], gone: int) -> list[int]:
    """Returns where dimensions stand once the dimension `gone` is cut."""
    return [place - (place > gone) for place in places]
