"""Positive scales: in front of a ReLU a neuron may be made larger if what reads it is made smaller."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mergekit_ot import AbstractProof, AbstractSymmetry, Block, ModelGraph, Places


class Scale(AbstractSymmetry):
    """``a · relu(x / a) = relu(x)`` for ``a > 0``: makers of a neuron times a, its readers divided by a."""

    name: ClassVar[str] = "scale"

    def find(self, graph: ModelGraph, proof: AbstractProof) -> Mapping[str, Places]:
        """Returns the groups without running statistics at which the proof confirms it."""
        proven = {}
        for key, group in graph.free_groups.items():
            places = {place: (-1 if slot.is_reader else 1,) for place, slot in group.places.items()}
            has_statistics = any(name in graph.buffers for name, _ in places)
            if not has_statistics and proof.is_proven(self, graph, key, places):
                proven[key] = places
        return proven

    def draw(self, size: int, generator: torch.Generator) -> Tensor:
        """Returns factors between a half and two."""
        return 2.0 ** (2.0 * torch.rand(size, generator=generator, dtype=torch.float64) - 1.0)

    def act(self, block: Block, place: int, element: Tensor, power: int) -> Tensor:
        """Returns the block with its neurons times their factors, or divided by them."""
        shape = [1] * block.view.ndim
        shape[place] = -1
        return block.view * (element**power).to(block.view).reshape(shape)
