"""Invertible maps: inner spaces of heads whose neurons may be replaced by any independent combinations of them.

What values make is only read by the output projection, and queries only meet keys: any invertible map of one side is
undone by its inverse on the other. Rotary positions and norms of queries and keys leave less (`rotations`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot.graph.blocks import Block
from mergekit_ot.graph.ir import ModelGraph, NeuronGroup
from mergekit_ot.graph.symmetry.rotations import inner_spaces, random_rotation
from mergekit_ot.graph.symmetry.symmetry import AbstractProof, AbstractSymmetry, Places

# The largest ratio of the factors by which an element stretches.
_CONDITION = 10.0
# Queries meet keys: two sides.
_SIDES = 2


class Invertible(AbstractSymmetry):
    """Neurons may be mixed by any invertible matrix, if what reads them gets its inverse transpose.

    It is found, proven and told by ``mergeot check``, and no solver uses it: once the inner spaces of two networks have
    been rotated onto each other, stretching them as well brought no gain where it was measured. Of a weight that holds
    queries and keys side by side, the two sides cannot be told apart, and it is not found.

    Example:
        >>> import torch
        >>> element = Invertible().draw(4, torch.Generator().manual_seed(0))
        >>> bool(torch.linalg.cond(element) <= 10)
        True
        >>> rows = Block(torch.eye(4).double(), ())
        >>> makers, readers = (Invertible().act(rows, 0, element, power) for power in (1, -1))
        >>> torch.allclose(makers.T @ readers, torch.eye(4).double())
        True
    """

    name: ClassVar[str] = "invertible"
    # Its elements hold in any state; in normal form they are proven beside the rotations.
    in_normal_form: ClassVar[bool] = True

    def find(self, graph: ModelGraph, proof: AbstractProof) -> Mapping[str, Places]:
        """Returns the inner spaces of heads at which a guess is proven."""
        guesses = {key: _sides(graph, graph.groups[key]) for key in inner_spaces(graph)}
        return proof.proven(self, graph, {key: places for key, places in guesses.items() if places})

    def draw(self, size: int, generator: torch.Generator) -> Float[Tensor, "size size"]:
        """Returns a random matrix that stretches by factors whose ratio is ten at most."""
        left, right = random_rotation(size, generator), random_rotation(size, generator)
        exponents = torch.rand(size, generator=generator, dtype=torch.float64) - 0.5
        return left @ torch.diag(_CONDITION**exponents) @ right

    def act(
        self, block: Block, place: int, element: Float[Tensor, "size size"], power: int
    ) -> Float[Tensor, "*dimensions"]:
        """Returns the block with its neurons mixed; at power -1 by the inverse transpose."""
        matrix = element if power == 1 else torch.linalg.inv(element).T
        mixed = torch.tensordot(matrix.to(block.view), block.view.movedim(place, 0), dims=1)
        return mixed.movedim(0, place)


def _sides(graph: ModelGraph, group: NeuronGroup) -> Places:
    """Returns the places with the powers of makers and readers, or of queries and keys; empty where none are told."""
    slots = group.places
    if any(slot.is_reader for slot in slots.values()):
        return {place: (-1 if slot.is_reader else 1,) for place, slot in slots.items()}
    if len(slots) < len(group.members):
        return {}
    modules = list(dict.fromkeys(_module(name) for name in _matrices(graph, group)))
    if len(modules) != _SIDES or len(_matrices(graph, group)) != _SIDES:
        return {}
    return {place: (1 if _module(place[0]) == modules[0] else -1,) for place in slots}


def _matrices(graph: ModelGraph, group: NeuronGroup) -> Sequence[str]:
    return [name for name, _ in group.places if len(graph.layouts[name]) > 1]


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]
