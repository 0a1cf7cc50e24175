"""Planted permutations: two sources of which one is the other in another order, with noise."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_ot import Barycenter, BarycenterProblem, Coupling, NeuronMeasure, Permutation
from mergekit_ot.testing import permuted


def planted_permutation(
    size: int, noise: float, dimension: int = 28, seed: int = 0, has_structure: bool = True
) -> tuple[BarycenterProblem, Coupling]:
    """Returns Gaussian input and recurrent weights with a reordered, noisy copy, and the coupling to be found.

    Args:
        size: Number of neurons, and of columns of the recurrent weights ``H``; the copy is ``P H Pᵀ + noise · Z``.
        noise: Standard deviation of what is added to every number of the copy; the numbers themselves have one.
        dimension: Columns of the input weights; 0 leaves the recurrent weights alone.
        seed: Seed of weights, order and noise.
        has_structure: Whether the recurrent weights are given at all.
    """
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    first = NeuronMeasure.uniform(gaussian(size, dimension), gaussian(1, size, size))
    order = torch.randperm(size, generator=generator)
    moved = permuted(first, order)
    copy = NeuronMeasure.uniform(
        moved.support + noise * gaussian(size, dimension), moved.structure + noise * gaussian(1, size, size)
    )
    measures = (first, copy)
    if not has_structure:
        measures = tuple(NeuronMeasure.uniform(measure.support) for measure in measures)
    return BarycenterProblem(measures, (0.5, 0.5), size, seed=seed), Permutation(torch.argsort(order))


def share_recovered(found: Barycenter, planted: Coupling) -> float:
    """Returns which part of the neurons has the partner that was planted."""
    ours, theirs = (coupling.average_map() for coupling in (found.couplings[1], planted))
    return float((ours * theirs).sum(1).mean())
