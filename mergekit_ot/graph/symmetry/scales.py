"""Positive scales: in front of a ReLU a neuron may be made larger if what reads it is made smaller.

``a · relu(x / a) = relu(x)`` for ``a > 0``, and so for every positively homogeneous activation. Behind a norm, its gain
and bias make the neuron. Where it holds is guessed from the places of a group and proven as every symmetry is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot.graph.blocks import Block, spread_along
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.symmetry.symmetry import AbstractProof, AbstractSymmetry, Places

# Operations of activations that may be positively homogeneous; without one the search is not worth its runs.
_HOMOGENEOUS = ("relu", "aten.abs", "clamp_min", "threshold", "aten.maximum")


class PositiveScale(AbstractSymmetry):
    """Neurons may be scaled by positive numbers, one by one, if what reads them is scaled back.

    It is found, proven and told by ``mergeot check``; no solver uses it.

    Example:
        >>> import torch
        >>> element = PositiveScale().draw(4, torch.Generator().manual_seed(0))
        >>> bool((element > 0).all())
        True
        >>> rows = Block(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), ())
        >>> PositiveScale().act(rows, 0, torch.tensor([2.0, 0.5]), -1).tolist()
        [[0.5, 1.0], [6.0, 8.0]]
    """

    name: ClassVar[str] = "positive scale"

    def find(self, graph: ModelGraph, proof: AbstractProof) -> Mapping[str, Places]:
        """Returns the groups that may be scaled, each with the numbers that grow and those that shrink."""
        operations = [str(data.get("operation", "")) for _, data in graph.operations.nodes(data=True)]
        if not any(name in operation for operation in operations for name in _HOMOGENEOUS):
            return {}
        guesses = {key: list(_guesses(graph, key)) for key in _eligible(graph)}
        proven: dict[str, Places] = {}
        for number in range(max(map(len, guesses.values()), default=0)):
            left = {key: each[number] for key, each in guesses.items() if key not in proven and len(each) > number}
            proven |= proof.proven(self, graph, left)
        return {key: proven[key] for key in guesses if key in proven}

    def draw(self, size: int, generator: torch.Generator) -> Float[Tensor, " size"]:
        """Returns factors between a half and two."""
        return 2.0 ** (2.0 * torch.rand(size, generator=generator, dtype=torch.float64) - 1.0)

    def act(
        self, block: Block, place: int, element: Float[Tensor, " size"], power: int
    ) -> Float[Tensor, "*dimensions"]:
        """Returns the block with its neurons times their factors, or divided by them."""
        return block.view * spread_along((element**power).to(block.view), place, block.view.ndim)


def _eligible(graph: ModelGraph) -> Iterator[str]:
    """Yields the groups that something reads; heads and what is in them are no neurons in front of an activation."""
    outer = {key for group in graph.groups.values() for key in group.context}
    for key, group in graph.free_groups.items():
        if not group.context and key not in outer and any(slot.is_reader for slot in group.members):
            yield key


def _guesses(graph: ModelGraph, key: str) -> Iterator[Places]:
    """Yields what may grow with a neuron: all that makes it, all but vectors behind that (slopes), or these alone."""
    slots = graph.groups[key].places
    readers = {place: (-1,) for place, slot in slots.items() if slot.is_reader}
    makers = [place for place in slots if place not in readers]
    has_statistics = any(name in graph.buffers for name, _ in slots)
    modules = {_module(name) for name, _ in makers if len(graph.layouts[name]) > 1}
    behind = [place for place in makers if place[0] not in graph.buffers and _module(place[0]) not in modules]
    if not has_statistics:
        yield {**readers, **dict.fromkeys(makers, (1,))}
    if behind and len(behind) < len(makers):
        if not has_statistics:
            yield {**readers, **{place: (int(place not in behind),) for place in makers}}
        # Gains of norms on a stream, which several maps write to, are scales of what reads them and of no neuron.
        if has_statistics or len(modules) == 1:
            yield {**readers, **{place: (int(place in behind),) for place in makers}}


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]
