"""What several solvers share: the ground cost, exact couplings, and the fused measure that couplings imply."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot.errors import SolverError
from mergekit_ot.transport.measure import Coupling, NeuronMeasure, uniform_mass
from mergekit_ot.transport.solver import Barycenter, BarycenterProblem, Status

# Network simplex stops early, with a wrong answer, at the solver's own default of 1e5 iterations on wide layers.
_SIMPLEX_ITERATIONS = 50_000_000


def ground_cost(target: Float[Tensor, "m d"], source: Float[Tensor, "n d"]) -> Float[Tensor, "m n"]:
    """Returns the squared Euclidean distance of every target neuron to every source neuron.

    One matrix product; half precision is raised to single, because the norms cancel. ``d`` may be 0.

    Example:
        >>> ground_cost(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [1.0]])).tolist()
        [[9.0, 1.0], [4.0, 0.0]]
    """
    target, source = _at_least_single(target), _at_least_single(source)
    norms = _squared_norms(target)[:, None] + _squared_norms(source)
    if target.shape[1] == 0:
        return norms
    return torch.addmm(norms, target, source.T, alpha=-2).clamp_(min=0)


def couple(
    cost: Float[Tensor, "m n"],
    target_mass: Float[Tensor, " m"] | None = None,
    source_mass: Float[Tensor, " n"] | None = None,
    prefer: Coupling | None = None,
) -> Coupling:
    """Returns an exact optimal coupling: a permutation where sizes and masses are equal, a transport plan otherwise.

    Args:
        cost: Ground cost ``[target, source]``.
        target_mass: Mass of each target neuron; None for uniform.
        source_mass: Mass of each source neuron; None for uniform.
        prefer: A permutation to keep where it is optimal up to rounding. Failing that, the identity is kept.

    Raises:
        SolverError: The cost is not finite; or the sizes differ and POT is not installed.

    Example:
        >>> couple(torch.tensor([[9.0, 1.0], [4.0, 9.0]])).index.tolist()
        [1, 0]
    """
    if not bool(torch.isfinite(cost).all()):
        raise SolverError(Status.NONFINITE.value)
    if cost.shape[0] != cost.shape[1] or not (_is_uniform(target_mass) and _is_uniform(source_mass)):
        return Coupling(plan=_exact_plan(cost, target_mass, source_mass))
    found = Coupling(index=torch.from_numpy(_assignment(_to_numpy(cost))).to(cost.device))
    for kept in (prefer, Coupling.identity(cost.shape[0], cost.device)):
        if kept is not None and kept.index is not None and _is_no_worse(kept, found, cost):
            return kept
    return found


def fused_measure(problem: BarycenterProblem, couplings: Sequence[Coupling]) -> NeuronMeasure:
    """Returns the barycenter for fixed couplings, in closed form.

    Supports are averaged, ``Σ_i λ_i Ā_i V_i``; structures are averaged on their rows and split on their columns,
    ``Σ_i λ_i Ā_i H_i S̄_i``. Both minimise the objective of arXiv:2210.06671 for these couplings.

    Raises:
        SolverError: Some sources have a structure and others have none.

    Example:
        >>> measures = tuple(NeuronMeasure.uniform(torch.tensor(rows)) for rows in ([[0.0], [2.0]], [[4.0], [0.0]]))
        >>> problem = BarycenterProblem(measures, (0.5, 0.5), size=2)
        >>> swapped = Coupling(index=torch.tensor([1, 0]))
        >>> fused_measure(problem, (Coupling.identity(2), swapped)).support.tolist()
        [[0.0], [3.0]]
    """
    first = problem.measures[0]
    support = torch.zeros(
        problem.size, first.support.shape[1], dtype=_single(first.support), device=first.support.device
    )
    structure = None
    if problem.has_structure:
        slices = _structure_slices(problem)
        structure = support.new_zeros(slices, problem.size, problem.size)
    for weight, measure, coupling in zip(problem.model_weights, problem.measures, couplings, strict=True):
        # A zero weight must not let a source's infinities through.
        if weight == 0:
            continue
        support.add_(_averaged(coupling, _at_least_single(measure.support)), alpha=weight)
        if structure is not None and measure.structure is not None:
            structure.add_(_on_both_axes(coupling, _at_least_single(measure.structure)), alpha=weight)
    dtype = first.support.dtype
    return NeuronMeasure(
        support.to(dtype),
        uniform_mass(problem.size, first.mass),
        None if structure is None else structure.to(dtype),
    )


def transport_cost(coupling: Coupling, target: Float[Tensor, "m d"], source: Float[Tensor, "n d"]) -> float:
    """Returns ``⟨Π, C⟩`` for the squared Euclidean ground cost; no matrix product for a permutation.

    Example:
        >>> transport_cost(Coupling.identity(2), torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [1.0]]))
        2.0
    """
    target, source = _at_least_single(target), _at_least_single(source)
    if coupling.index is not None:
        return _squared_sum(source[coupling.index].sub_(target)) / max(coupling.target_size, 1)
    return float((coupling.transport_plan(target) * ground_cost(target, source)).sum())


def barycenter_cost(problem: BarycenterProblem, couplings: Sequence[Coupling], support: Float[Tensor, "m d"]) -> float:
    """Returns the objective ``Σ_i λ_i ⟨Π_i, C_i⟩`` of supports alone; sources of zero weight are not looked at.

    Example:
        >>> measures = tuple(NeuronMeasure.uniform(torch.tensor(rows)) for rows in ([[0.0], [2.0]], [[4.0], [0.0]]))
        >>> problem = BarycenterProblem(measures, (0.5, 0.5), size=2)
        >>> couplings = (Coupling.identity(2), Coupling(index=torch.tensor([1, 0])))
        >>> barycenter_cost(problem, couplings, torch.tensor([[0.0], [3.0]]))
        0.5
    """
    return sum(
        weight * transport_cost(coupling, support, measure.support)
        for weight, coupling, measure in zip(problem.model_weights, couplings, problem.measures, strict=True)
        if weight > 0
    )


def rounding_error(problem: BarycenterProblem) -> float:
    """Returns the size below which a difference of two objectives of this problem is rounding.

    Example:
        >>> measures = tuple(NeuronMeasure.uniform(torch.tensor(rows)) for rows in ([[0.0], [2.0]], [[4.0], [0.0]]))
        >>> problem = BarycenterProblem(measures, (0.5, 0.5), size=2)
        >>> 0 < rounding_error(problem) < 1e-4
        True
    """
    epsilon = torch.finfo(_single(problem.measures[0].support)).eps
    moments = (
        weight * _squared_sum(_at_least_single(measure.support)) / max(measure.size, 1)
        for weight, measure in zip(problem.model_weights, problem.measures, strict=True)
        if weight > 0
    )
    return 8 * epsilon * sum(moments)


def in_order_of(couplings: Sequence[Coupling], source: int) -> tuple[Coupling, ...]:
    """Returns the couplings with the fused neurons put in the order of one source, where it has a permutation.

    Example:
        >>> couplings = (Coupling(index=torch.tensor([1, 0])), Coupling.identity(2))
        >>> [coupling.index.tolist() for coupling in in_order_of(couplings, 0)]
        [[0, 1], [1, 0]]
    """
    index = couplings[source].index
    if index is None or couplings[source].is_identity:
        return tuple(couplings)
    order = torch.argsort(index)
    return tuple(
        Coupling(index=coupling.index[order]) if coupling.plan is None else Coupling(plan=coupling.plan[order])  # type: ignore[index]
        for coupling in couplings
    )


def independent_coupling(target_mass: Float[Tensor, " m"], source_mass: Float[Tensor, " n"]) -> Coupling:
    """Returns the coupling that knows nothing: every target neuron takes from every source neuron.

    Example:
        >>> independent_coupling(torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])).plan.tolist()
        [[0.125, 0.375], [0.125, 0.375]]
    """
    return Coupling(plan=torch.outer(target_mass, source_mass))


def unsolved(problem: BarycenterProblem) -> Barycenter | None:
    """Returns the barycenter to hand back where a source is not finite, and None where all are.

    Its couplings are those in force, or else the identity (sizes equal) or the independent coupling.

    Example:
        >>> measures = tuple(NeuronMeasure.uniform(torch.tensor(rows)) for rows in ([[0.0], [2.0]], [[4.0], [0.0]]))
        >>> problem = BarycenterProblem(measures, (0.5, 0.5), size=2)
        >>> unsolved(problem) is None
        True
    """
    tensors = (tensor for measure in problem.measures for tensor in (measure.support, measure.structure))
    if all(tensor is None or _is_finite(tensor) for tensor in tensors):
        return None
    couplings = problem.initial or tuple(
        Coupling.identity(problem.size, measure.support.device)
        if measure.size == problem.size
        else independent_coupling(uniform_mass(problem.size, measure.mass), measure.mass)
        for measure in problem.measures
    )
    return Barycenter(fused_measure(problem, couplings), couplings, float("nan"), Status.NONFINITE)


def _squared_norms(rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    return torch.linalg.vector_norm(rows, dim=1).square()


def _squared_sum(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) ** 2


def _is_finite(tensor: Tensor) -> bool:
    # The sum settles almost every case without a second array of the tensor's size; it may overflow by itself.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _averaged(coupling: Coupling, support: Tensor) -> Tensor:
    return support[coupling.index] if coupling.index is not None else coupling.average_map(support) @ support


def _on_both_axes(coupling: Coupling, structure: Float[Tensor, "s n n"]) -> Float[Tensor, "s m m"]:
    if coupling.index is not None:
        return structure[:, coupling.index][:, :, coupling.index]
    return coupling.average_map(structure) @ structure @ coupling.split_map(structure)


def _structure_slices(problem: BarycenterProblem) -> int:
    slices = {None if measure.structure is None else measure.structure.shape[0] for measure in problem.measures}
    if len(slices) != 1:
        raise SolverError(
            f"The sources' structures do not match: {sorted(map(str, slices))} matrices per source. "
            "A barycenter needs the same structure matrices of every source; give all of them, or none."
        )
    return slices.pop() or 0


def _assignment(cost: np.ndarray) -> np.ndarray:
    """Returns the column of each row; Jonker-Volgenant by lapx, Hungarian by SciPy where lapx is missing."""
    solver = _optional("lap")
    # The compiled solver's own start-up steps are not safe below three rows; SciPy is as fast there.
    if solver is None or cost.shape[0] < 3:
        from scipy.optimize import linear_sum_assignment

        return np.asarray(linear_sum_assignment(cost)[1], dtype=np.int64)
    columns, _ = solver.lapjvs(
        np.ascontiguousarray(cost), return_cost=False, jvx_like=False, prefer_float32=cost.dtype == np.float32
    )
    return np.asarray(columns, dtype=np.int64)


def _exact_plan(cost: Tensor, target_mass: Tensor | None, source_mass: Tensor | None) -> Tensor:
    transport = _optional("ot")
    if transport is None:
        raise SolverError(
            f"Neurons cannot be coupled {cost.shape[0]} to {cost.shape[1]}: groups of different size (or mass) need "
            "the network simplex of POT, which is not installed. Install it with 'pip install POT'."
        )
    target, source = (
        np.full(size, 1.0 / size) if mass is None else _to_numpy(mass.double() / mass.double().sum())
        for mass, size in zip((target_mass, source_mass), cost.shape, strict=True)
    )
    plan, log = transport.emd(target, source, _to_numpy(cost.double()), numItermax=_SIMPLEX_ITERATIONS, log=True)
    if log["warning"]:
        raise SolverError(f"The network simplex found no optimal plan: {log['warning']}. Look at the masses and costs.")
    return torch.from_numpy(plan).to(cost)


def _is_no_worse(kept: Coupling, found: Coupling, cost: Tensor) -> bool:
    rows = torch.arange(cost.shape[0], device=cost.device)
    kept_cost, found_cost = (float(cost[rows, coupling.index].double().sum()) for coupling in (kept, found))
    slack = 4 * torch.finfo(cost.dtype).eps * float(cost.abs().mean()) * max(cost.shape[0], 1)
    return kept_cost <= found_cost + slack if cost.numel() else True


def _is_uniform(mass: Tensor | None) -> bool:
    return mass is None or bool(torch.allclose(mass, uniform_mass(mass.numel(), mass), atol=0, rtol=1e-6))


def _optional(module: str) -> ModuleType | None:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _single(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _at_least_single(tensor: Tensor) -> Tensor:
    return tensor.to(_single(tensor))
