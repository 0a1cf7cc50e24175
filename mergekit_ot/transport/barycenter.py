"""The fused measure that couplings imply, and what it costs: the closed forms that solvers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot.errors import SolverError
from mergekit_ot.transport.averaging import Share, mean_over_present
from mergekit_ot.transport.coupling import Coupling
from mergekit_ot.transport.ground_cost import at_least_single, ground_cost
from mergekit_ot.transport.measure import DeferredMeasure, NeuronMeasure, Signs, uniform_mass
from mergekit_ot.transport.permutation import Permutation
from mergekit_ot.transport.plan import Plan
from mergekit_ot.transport.problem import Barycenter, BarycenterProblem, Status
from mergekit_ot.transport.support import ComputedSupport


def fused_measure(problem: BarycenterProblem, couplings: Sequence[Coupling]) -> NeuronMeasure:
    """Returns the barycenter for fixed couplings, in closed form.

    Supports are averaged, ``Σ_i λ_i Ā_i V_i``; structures are averaged on their rows and split on their columns,
    ``Σ_i λ_i Ā_i H_i S̄_i``. Both minimise the objective of arXiv:2210.06671 for these couplings. A fused neuron that
    has no partner in some source is the mean over the others.

    Raises:
        SolverError: Some sources have a structure and others have none.

    Example:
        >>> measures = tuple(NeuronMeasure.uniform(torch.tensor(rows)) for rows in ([[0.0], [2.0]], [[4.0], [0.0]]))
        >>> problem = BarycenterProblem(measures, (0.5, 0.5), size=2)
        >>> swapped = Permutation(torch.tensor([1, 0]))
        >>> fused_measure(problem, (Permutation.identity(2), swapped)).support.tolist()
        [[0.0], [3.0]]
    """
    _check_structures(problem)
    first = problem.measures[0]

    def support() -> Tensor:
        return mean_over_present(_shares(problem, couplings, averaged_support)).to(first.dtype)

    structure = None
    if problem.has_structure:
        structure = mean_over_present(_shares(problem, couplings, _moved_structure)).to(first.dtype)
    mass = uniform_mass(problem.size, first.mass)
    if first.joined is None:
        rows = ComputedSupport(support, mass.to(first.dtype), (problem.size, first.columns))
        return DeferredMeasure(rows, mass, structure, first.signs)
    return NeuronMeasure(support(), mass, structure, first.signs)


def _shares(
    problem: BarycenterProblem, couplings: Sequence[Coupling], move: Callable[[Coupling, NeuronMeasure], Tensor | None]
) -> Iterator[Share]:
    """Yields what each source brings, rows along the last axis but one; a weightless one must not bring infinities."""
    dtype = torch.promote_types(problem.measures[0].dtype, torch.float32)
    for weight, measure, coupling in zip(problem.model_weights, problem.measures, couplings, strict=True):
        values = move(coupling, measure) if weight > 0 else None
        if values is not None:
            values = values.to(dtype)
            here = coupling.presence(values)
            yield Share(weight, values, None if here is None else here[:, None])


def _moved_structure(coupling: Coupling, measure: NeuronMeasure) -> Tensor | None:
    if measure.structure is None:
        return None
    return coupling.move_structure(at_least_single(measure.structure), measure.signs)


def transport_cost(
    coupling: Coupling,
    target: Float[Tensor, "m d"],
    source: Float[Tensor, "n d"],
    signs: Signs | None = None,
) -> float:
    """Returns ``⟨Π, C⟩`` for the squared Euclidean ground cost; no matrix product for a permutation.

    Args:
        coupling: The coupling.
        target: Support of the fused group.
        source: Support of the source.
        signs: Which columns change sign with a negated neuron.

    Example:
        >>> transport_cost(Permutation.identity(2), torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [1.0]]))
        2.0
    """
    target, source = at_least_single(target), at_least_single(source)
    if coupling.is_exact:
        # Summed as differences, which keeps digits.
        return _squared_sum(coupling.move_support(source, signs) - target) / max(coupling.target_size, 1)
    plan = coupling.transport_plan(target)
    cost = float((plan * ground_cost(target, source)).sum())
    if signs is None:
        return cost
    product = target[:, signs.columns] @ source[:, signs.columns].T
    return cost + 2 * float(((plan - coupling.signed_plan(target)) * product).sum())


def barycenter_cost(problem: BarycenterProblem, couplings: Sequence[Coupling], support: Float[Tensor, "m d"]) -> float:
    """Returns the objective ``Σ_i λ_i ⟨Π_i, C_i⟩`` of supports alone; sources of zero weight are not looked at.

    Example:
        >>> measures = tuple(NeuronMeasure.uniform(torch.tensor(rows)) for rows in ([[0.0], [2.0]], [[4.0], [0.0]]))
        >>> problem = BarycenterProblem(measures, (0.5, 0.5), size=2)
        >>> couplings = (Permutation.identity(2), Permutation(torch.tensor([1, 0])))
        >>> barycenter_cost(problem, couplings, torch.tensor([[0.0], [3.0]]))
        0.5
    """
    return sum(
        weight * transport_cost(coupling, support, measure.support, measure.signs)
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
    epsilon = torch.finfo(torch.promote_types(problem.measures[0].dtype, torch.float32)).eps
    moments = (
        weight * _moment(measure) / max(measure.size, 1)
        for weight, measure in zip(problem.model_weights, problem.measures, strict=True)
        if weight > 0
    )
    return 8 * epsilon * sum(moments)


def in_order_of(couplings: Sequence[Coupling], source: int) -> tuple[Coupling, ...]:
    """Returns the couplings with the fused neurons in the order and signs of one source, where it has a permutation.

    Example:
        >>> couplings = (Permutation(torch.tensor([1, 0])), Permutation.identity(2))
        >>> [coupling.partners().tolist() for coupling in in_order_of(couplings, 0)]
        [[0, 1], [1, 0]]
    """
    return couplings[source].in_source_order(couplings)


def independent_coupling(target_mass: Float[Tensor, " m"], source_mass: Float[Tensor, " n"]) -> Coupling:
    """Returns the coupling that knows nothing: every target neuron takes from every source neuron.

    Example:
        >>> independent_coupling(torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])).transport_plan().tolist()
        [[0.125, 0.375], [0.125, 0.375]]
    """
    return Plan(torch.outer(target_mass, source_mass))


def unsolved(problem: BarycenterProblem) -> Barycenter | None:
    """Returns the barycenter to hand back where a source is not finite, and None where all are.

    Its couplings are those in force, or else the identity (sizes equal) or the independent coupling.

    Example:
        >>> measures = tuple(NeuronMeasure.uniform(torch.tensor(rows)) for rows in ([[0.0], [2.0]], [[4.0], [0.0]]))
        >>> problem = BarycenterProblem(measures, (0.5, 0.5), size=2)
        >>> unsolved(problem) is None
        True
    """
    if all(_has_finite_support(measure) and _is_finite(measure.structure) for measure in problem.measures):
        return None
    couplings = problem.initial or tuple(_without_looking(problem.size, measure) for measure in problem.measures)
    return Barycenter(fused_measure(problem, couplings), couplings, float("nan"), Status.NONFINITE)


def _squared_sum(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) ** 2


def _without_looking(size: int, measure: NeuronMeasure) -> Coupling:
    if measure.size == size:
        return Permutation.identity(size, measure.mass.device)
    return independent_coupling(uniform_mass(size, measure.mass), measure.mass)


def _moment(measure: NeuronMeasure) -> float:
    rows = measure.deferred
    return _squared_sum(at_least_single(measure.support)) if rows is None else float(rows.squared_norms().sum())


def _has_finite_support(measure: NeuronMeasure) -> bool:
    rows = measure.deferred
    if rows is None:
        return _is_finite(measure.support)
    # Squares may overflow where the numbers do not.
    return _is_finite(rows.squared_norms()) or _is_finite(rows.row_maxima())


def _is_finite(tensor: Tensor | None) -> bool:
    # The sum settles almost every case without a second array of the tensor's size; it may overflow by itself.
    return tensor is None or bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def averaged_support(coupling: Coupling, measure: NeuronMeasure) -> Float[Tensor, "m d"]:
    """Returns a source's support moved to the fused neurons: ``Ā V``, signs included; not to be written to.

    Example:
        >>> measure = NeuronMeasure.uniform(torch.tensor([[1.0], [2.0]]))
        >>> averaged_support(Permutation(torch.tensor([1, 0])), measure).tolist()
        [[2.0], [1.0]]
    """
    return coupling.move_support(at_least_single(measure.support), measure.signs)


def _check_structures(problem: BarycenterProblem) -> None:
    slices = {None if measure.structure is None else measure.structure.shape[0] for measure in problem.measures}
    if len(slices) != 1:
        raise SolverError(
            f"The sources' structures do not match: {sorted(map(str, slices))} matrices per source. "
            "A barycenter needs the same structure matrices of every source; give all of them, or none."
        )


def support_barycenter(
    problem: BarycenterProblem, couplings: Sequence[Coupling], trace: Sequence[float] = ()
) -> Barycenter:
    """Returns the barycenter that couplings imply where structure has no say: one step of a search that goes on.

    Args:
        problem: The fusion of a group.
        couplings: One per source.
        trace: Objectives of the steps before; that of these couplings is appended, in ``stats["objective"]``.

    Example:
        >>> measures = tuple(NeuronMeasure.uniform(torch.tensor(rows)) for rows in ([[0.0], [2.0]], [[4.0], [0.0]]))
        >>> problem = BarycenterProblem(measures, (0.5, 0.5), size=2)
        >>> swapped = Permutation(torch.tensor([1, 0]))
        >>> support_barycenter(problem, (Permutation.identity(2), swapped), trace=[3.0]).stats["objective"]
        [3.0, 0.5]
    """
    plain = tuple(
        measure if measure.structure is None else replace(measure, structure=None) for measure in problem.measures
    )
    measure = fused_measure(replace(problem, measures=plain), couplings)
    cost = barycenter_cost(problem, couplings, measure.support)
    return Barycenter(measure, tuple(couplings), cost, Status.MAX_STEPS, {"objective": [*trace, cost]})
