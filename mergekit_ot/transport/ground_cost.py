"""What several solvers share: the ground cost, and exact couplings."""

from __future__ import annotations

import functools
import importlib
import itertools
from types import ModuleType

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergekit_ot.errors import SolverError
from mergekit_ot.transport.assignment import Prices, assigned, is_no_worse
from mergekit_ot.transport.coupling import Coupling
from mergekit_ot.transport.measure import NeuronMeasure, uniform_mass
from mergekit_ot.transport.permutation import Permutation
from mergekit_ot.transport.plan import Plan
from mergekit_ot.transport.problem import Status
from mergekit_ot.transport.scale import squarable

# Network simplex stops early, with a wrong answer, at the solver's own default of 1e5 iterations on wide layers.
_SIMPLEX_ITERATIONS = 50_000_000
# All orders of so few neurons are tried at once.
TRIED_SIZE = 4
# The compiled solver's own start-up steps are not safe below three rows, and SciPy takes long to import.
_FEWEST = ((1, 1), (2, 2))


def ground_cost(target: Float[Tensor, "m d"], source: Float[Tensor, "n d"]) -> Float[Tensor, "m n"]:
    """Returns the squared Euclidean distance of every target neuron to every source neuron.

    One matrix product; half precision is raised to single, because the norms cancel, and all to double where single
    precision could not hold the squares. ``d`` may be 0.

    Example:
        >>> ground_cost(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [1.0]])).tolist()
        [[9.0, 1.0], [4.0, 0.0]]
    """
    target, source = squarable(at_least_single(target), at_least_single(source))
    norms = _squared_norms(target)[:, None] + _squared_norms(source)
    if target.shape[1] == 0:
        return norms
    return torch.addmm(norms, target, source.T, alpha=-2).clamp_(min=0)


def measure_cost(target: NeuronMeasure, source: NeuronMeasure) -> Float[Tensor, "m n"]:
    """Returns the ground cost of two measures; where their supports are deferred, without joining them.

    Example:
        >>> one, other = (NeuronMeasure.uniform(torch.tensor(rows)) for rows in ([[0.0], [1.0]], [[3.0], [1.0]]))
        >>> measure_cost(one, other).tolist()
        [[9.0, 1.0], [4.0, 0.0]]
    """
    ours, theirs = target.deferred, source.deferred
    products = None if ours is None or theirs is None else ours.products(theirs)
    if ours is None or theirs is None or products is None:
        return ground_cost(target.support, source.support)
    norms = ours.squared_norms()[:, None] + theirs.squared_norms()
    return norms.sub_(products, alpha=2).clamp_(min=0)


def couple(
    cost: Float[Tensor, "m n"],
    target_mass: Float[Tensor, " m"] | None = None,
    source_mass: Float[Tensor, " n"] | None = None,
    prefer: Coupling | None = None,
    prices: Prices | None = None,
) -> Coupling:
    """Returns an exact optimal coupling: a permutation where sizes and masses are equal, a transport plan otherwise.

    Args:
        cost: Ground cost ``[target, source]``.
        target_mass: Mass of each target neuron; None for uniform.
        source_mass: Mass of each source neuron; None for uniform.
        prefer: A permutation to keep where it is optimal up to rounding. Failing that, the identity is kept.
        prices: Those of a similar cost, a permutation's; they become those of this one.

    Raises:
        SolverError: The cost is not finite; or the sizes differ and POT is not installed.

    Example:
        >>> couple(torch.tensor([[9.0, 1.0], [4.0, 9.0]])).partners().tolist()
        [1, 0]
    """
    # The sum settles almost every case in one pass; it may overflow by itself.
    if prices is None and not (bool(torch.isfinite(cost.sum())) or bool(torch.isfinite(cost).all())):
        raise SolverError(Status.NONFINITE.value)
    if cost.shape[0] != cost.shape[1] or not (_is_uniform(target_mass) and _is_uniform(source_mass)):
        return Plan(_exact_plan(cost, target_mass, source_mass))
    array = _to_numpy(cost)
    found = _assignment(array, prices)
    largest = None if prices is None else prices.largest
    if (
        prefer is not None
        and prefer.is_permutation
        and is_no_worse(_to_numpy(prefer.partners()), found, array, largest)
    ):
        return prefer
    if is_no_worse(np.arange(len(found)), found, array, largest):
        return Permutation.identity(len(found), cost.device)
    return Permutation(torch.from_numpy(found).to(cost.device))


@functools.cache
def all_orders(size: int) -> Int[Tensor, "k n"]:
    """Returns all orders of a few neurons.

    Example:
        >>> all_orders(2).tolist()
        [[0, 1], [1, 0]]
    """
    return torch.tensor(list(itertools.permutations(range(size))), dtype=torch.long).reshape(-1, size)


def assignment_costs(costs: Float[Tensor, "p n n"]) -> Float[Tensor, " p"]:
    """Returns the least cost of each of many small assignments, the sum over its neurons.

    Example:
        >>> assignment_costs(torch.tensor([[[9.0, 1.0], [4.0, 9.0]], [[1.0, 2.0], [2.0, 1.0]]])).tolist()
        [5.0, 2.0]
    """
    if not (bool(torch.isfinite(costs.sum())) or bool(torch.isfinite(costs).all())):
        raise SolverError(Status.NONFINITE.value)
    count, size = costs.shape[:2]
    if size <= TRIED_SIZE:
        orders = all_orders(size).to(costs.device)
        return costs[:, torch.arange(size, device=costs.device), orders].sum(2).amin(1)
    found = np.stack([_assignment(each) for each in _to_numpy(costs)]) if count else np.zeros((0, size), np.int64)
    return costs.gather(2, torch.from_numpy(found).to(costs.device)[:, :, None]).sum((1, 2))


def _squared_norms(rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    return torch.linalg.vector_norm(rows, dim=1).square()


def _assignment(cost: np.ndarray, prices: Prices | None = None) -> np.ndarray:
    """Returns the column of each row; Jonker-Volgenant by lapx, Hungarian by SciPy where lapx is missing."""
    if cost.shape in _FEWEST:
        # Halves do not overflow where the costs themselves are near the largest number.
        halves = 0.5 * cost.astype(np.float64)
        is_turned = len(cost) == 2 and halves[0, 1] + halves[1, 0] < halves[0, 0] + halves[1, 1]
        return np.arange(len(cost), dtype=np.int64)[:: -1 if is_turned else 1].copy()
    lap = _optional("lap")
    if lap is None or cost.shape[0] < 3:
        from scipy.optimize import linear_sum_assignment

        return np.asarray(linear_sum_assignment(cost)[1], dtype=np.int64)

    def solve(levelled: np.ndarray) -> np.ndarray:
        return np.asarray(lap.lapjvr(levelled, return_cost=False)[1], dtype=np.int64)

    return assigned(solve, cost, prices)


def _exact_plan(cost: Tensor, target_mass: Tensor | None, source_mass: Tensor | None) -> Tensor:
    transport = _optional("ot")
    if transport is None:
        raise SolverError(
            f"Neurons cannot be coupled {cost.shape[0]} to {cost.shape[1]}: groups of different size (or mass) need "
            "the network simplex of POT, which is not installed. Install it with 'pip install POT'."
        )
    rows, columns = cost.shape
    if _is_uniform(target_mass) and _is_uniform(source_mass):
        # Whole numbers: sums of 1/m and of 1/n differ in the last digit, which the network simplex calls infeasible.
        target, source = np.full(rows, float(columns)), np.full(columns, float(rows))
    else:
        target, source = (
            np.full(size, 1.0 / size) if mass is None else _to_numpy(mass.double() / mass.double().sum())
            for mass, size in zip((target_mass, source_mass), cost.shape, strict=True)
        )
        source *= target.sum() / source.sum()
    # A constant changes no plan; far from zero, it costs the simplex digits.
    shifted = _to_numpy((cost - cost.min()).double())
    plan, log = transport.emd(target, source, shifted, numItermax=_SIMPLEX_ITERATIONS, log=True)
    if log["warning"]:
        raise SolverError(f"The network simplex found no optimal plan: {log['warning']}. Look at the masses and costs.")
    return torch.from_numpy(plan / target.sum()).to(cost)


def _is_uniform(mass: Tensor | None) -> bool:
    return mass is None or bool(torch.allclose(mass, uniform_mass(mass.numel(), mass), atol=0, rtol=1e-6))


def _optional(module: str) -> ModuleType | None:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def single_precision(tensor: Tensor) -> torch.dtype:
    """Returns the dtype that costs of a tensor are computed in: its own, and single where it is less.

    Example:
        >>> single_precision(torch.zeros(1, dtype=torch.float16)), single_precision(torch.zeros(1, dtype=torch.float64))
        (torch.float32, torch.float64)
    """
    return torch.promote_types(tensor.dtype, torch.float32)


def at_least_single(tensor: Tensor) -> Tensor:
    """Returns the tensor in `single_precision`.

    Example:
        >>> at_least_single(torch.ones(1, dtype=torch.bfloat16))
        tensor([1.])
    """
    return tensor.to(single_precision(tensor))
