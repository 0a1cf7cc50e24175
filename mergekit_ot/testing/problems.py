"""Barycenter problems to check solvers on, and the exact answer to small ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_ot.transport.coupling import Coupling
from mergekit_ot.transport.ground_cost import ground_cost
from mergekit_ot.transport.measure import NeuronMeasure
from mergekit_ot.transport.permutation import Permutation
from mergekit_ot.transport.problem import BarycenterProblem

SIZE = 7


def random_problem(
    sizes: Sequence[int] = (SIZE, SIZE),
    size: int | None = None,
    dimension: int = 5,
    slices: int = 0,
    model_weights: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> BarycenterProblem:
    """Returns a problem of unrelated Gaussian measures with uniform masses.

    Args:
        sizes: Number of neurons of each source.
        size: Number of neurons of the fused group; that of the first source where left out.
        dimension: Columns of the supports; may be 0.
        slices: Structure matrices of each source; 0 for no structure.
        model_weights: One per source; equal where left out.
        dtype: Dtype of all tensors.
        device: Device of all tensors.
        seed: Seed of the measures, and of the problem.

    Example:
        >>> [measure.size for measure in random_problem((5, 4)).measures]
        [5, 4]
    """
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)

    measures = tuple(
        NeuronMeasure.uniform(gaussian(count, dimension), gaussian(slices, count, count) / count if slices else None)
        for count in sizes
    )
    weights = tuple(model_weights) if model_weights is not None else (1.0 / len(sizes),) * len(sizes)
    return BarycenterProblem(measures, weights, sizes[0] if size is None else size, seed=seed)


def permuted(measure: NeuronMeasure, order: torch.Tensor) -> NeuronMeasure:
    """Returns the measure whose neuron ``k`` is neuron ``order[k]`` of `measure`.

    Example:
        >>> from mergekit_ot import NeuronMeasure
        >>> permuted(NeuronMeasure.uniform(torch.tensor([[1.0], [2.0]])), torch.tensor([1, 0])).support.tolist()
        [[2.0], [1.0]]
    """
    structure = measure.structure
    if structure is not None:
        structure = structure[:, order][:, :, order]
    return NeuronMeasure(measure.support[order], measure.mass[order], structure)


def best_permutations(problem: BarycenterProblem) -> tuple[Coupling, ...]:
    """Returns the permutations of least objective, by trying all: a few sources of a few neurons, and no structure.

    The free support is eliminated: the objective is ``Σ_{i<j} λ_i λ_j`` times the mean squared distance of the
    neurons that sources i and j send to the same place.
    """
    device = problem.measures[0].support.device
    orders = torch.tensor(list(itertools.permutations(range(problem.size))), device=device)
    count = len(problem.measures)
    # The first source keeps its order; one dimension per further source.
    total = torch.zeros((1,) + (len(orders),) * (count - 1), dtype=torch.float64, device=device)
    for one, other in itertools.combinations(range(count), 2):
        pair = _pair_objective(problem, one, other, orders)
        shape = [1] * count
        shape[one], shape[other] = pair.shape
        total = total + pair.reshape(shape)
    best = torch.unravel_index(total.argmin(), total.shape)
    return tuple(Permutation(orders[int(place)]) for place in best)


def _pair_objective(problem: BarycenterProblem, one: int, other: int, orders: Tensor) -> Tensor:
    cost = ground_cost(problem.measures[one].support.double(), problem.measures[other].support.double())
    ours = orders[:1] if one == 0 else orders
    weight = problem.model_weights[one] * problem.model_weights[other]
    return weight * cost[ours[:, None], orders[None]].mean(2)
