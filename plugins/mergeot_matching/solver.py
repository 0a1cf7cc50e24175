"""Weight matching (arXiv:2209.04836) and activation matching: one core, two descriptions of a neuron.

The core aligns every source with the first one, and for more than two sources goes on by coordinate ascent. What
makes a method of it is how neurons are seen:

- incident weights, from the identity, sweep after sweep: weight matching;
- responses to calibration data, from nothing, in one sweep: activation matching.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from mergekit_ot import (
    AbstractBarycenterSolver,
    Barycenter,
    BarycenterProblem,
    Coupling,
    NeuronMeasure,
    RecipeError,
    Scope,
    SolverError,
    Start,
    Status,
    barycenter_cost,
    couple,
    fused_measure,
    ground_cost,
    in_order_of,
    rounding_error,
    transport_cost,
    uniform_mass,
    unsolved,
)


@dataclass(frozen=True)
class AbstractMatchingSolver(AbstractBarycenterSolver):
    """Aligns each source with the weighted mean of the others; the first keeps its order.

    Two sources need one assignment. With more, coordinate ascent never worsens the objective
    ``Σ_i λ_i ⟨Π_i, C_i⟩``, which is the weighted sum of squared distances of all pairs of aligned sources.

    Attributes:
        max_steps: Rounds of coordinate ascent at most.
    """

    max_steps: int = 100

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise RecipeError(f"Option max_steps={self.max_steps} of '{self.name}' must be at least 1.")

    def solve(self, problem: BarycenterProblem) -> Barycenter:
        """Returns the aligned sources' mean; never worse than the couplings in force.

        Raises:
            SolverError: No source has the size of the fused group.
        """
        failure = unsolved(problem)
        if failure is not None:
            return failure
        sizes = [measure.size for measure in problem.measures]
        if problem.size not in sizes:
            raise SolverError(
                f"The fused group has {problem.size} neurons and the sources have {sizes}: '{self.name}' starts at a "
                "source of that size. Choose another target, or the solver 'wb'."
            )
        if problem.is_assignment and len(sizes) == 2:
            return _matched_pair(problem)
        if problem.is_assignment:
            aligned = _aligned_in_turn(problem)
        else:
            aligned = _coupled_with(problem, problem.measures[sizes.index(problem.size)].support)
        best = self._ascend(problem, aligned)
        if problem.initial is not None:
            in_force = self._ascend(problem, problem.initial)
            if in_force.cost <= best.cost + rounding_error(problem):
                best = in_force
        couplings = _with_weightless(problem, best.couplings)
        return replace(best, couplings=couplings, measure=fused_measure(problem, couplings))

    def _ascend(self, problem: BarycenterProblem, couplings: Sequence[Coupling]) -> Barycenter:
        """Realigns one source after the other, until a round changes nothing."""
        best = _barycenter(problem, couplings, [], Status.MAX_STEPS)
        for _ in range(self.max_steps):
            current = list(best.couplings)
            for place in range(1 if problem.is_assignment else 0, len(current)):
                current[place] = _realigned(problem, current, place)
            found = _barycenter(problem, current, best.stats["objective"], Status.MAX_STEPS)  # type: ignore[arg-type]
            if not found.cost < best.cost - rounding_error(problem):
                return replace(best, status=Status.CONVERGED)
            best = found
        return best


@dataclass(frozen=True)
class WeightMatchingSolver(AbstractMatchingSolver):
    """Matches neurons by every weight that touches them, in sweeps from the identity (arXiv:2209.04836)."""

    name: ClassVar[str] = "weight-matching"
    summary: ClassVar[str] = "assignment on incident weights, swept until no gain (Git Re-Basin, arXiv:2209.04836)"
    scope: ClassVar[Scope] = Scope.INCIDENT
    start: ClassVar[Start] = Start.IDENTITY
    is_order_random: ClassVar[bool] = True
    max_sweeps: ClassVar[int] = 100


@dataclass(frozen=True)
class ActivationMatchingSolver(AbstractMatchingSolver):
    """Matches neurons by their responses to calibration data, in one sweep."""

    name: ClassVar[str] = "activation-matching"
    summary: ClassVar[str] = "assignment on responses to calibration data (arXiv:2209.04836)"
    measure: ClassVar[str] = "activations"


def _aligned_in_turn(problem: BarycenterProblem) -> tuple[Coupling, ...]:
    """Aligns each source with the mean of those before it: a start that no order of neurons can spoil."""
    first = problem.measures[0].support
    couplings = [Coupling.identity(problem.size, first.device)]
    for place in range(1, len(problem.measures)):
        target = _mean(problem, couplings, range(place))
        couplings.append(couple(ground_cost(target, problem.measures[place].support)))
    return tuple(couplings)


def _matched_pair(problem: BarycenterProblem) -> Barycenter:
    """Returns the barycenter of two sources of one size: one product and one assignment solve it.

    For two sources ``Σ_i λ_i |w - V_i|²`` is ``λ_1 λ_2 |V_1 - P V_2|²``, so no barycenter is needed for the cost.
    """
    first, second = (measure.support for measure in problem.measures)
    in_force = in_order_of(problem.initial, 0) if problem.initial is not None else (None, None)
    coupling = couple(ground_cost(first, second), prefer=in_force[1])
    if problem.initial is not None and in_force[0] is problem.initial[0] and coupling is problem.initial[1]:
        couplings = problem.initial
    else:
        couplings = (in_force[0] or Coupling.identity(problem.size, first.device), coupling)
    weight = problem.model_weights[0] * problem.model_weights[1]
    cost = weight * transport_cost(coupling, first, second) if weight > 0 else 0.0
    return Barycenter(fused_measure(problem, couplings), couplings, cost, Status.CONVERGED, {"objective": [cost]})


def _coupled_with(problem: BarycenterProblem, support: Float[Tensor, "m d"]) -> tuple[Coupling, ...]:
    return tuple(
        couple(ground_cost(support, measure.support), uniform_mass(problem.size, measure.mass), measure.mass)
        for measure in problem.measures
    )


def _realigned(problem: BarycenterProblem, couplings: Sequence[Coupling], place: int) -> Coupling:
    """Returns the best coupling of one source with the mean of the others (of all, where sizes differ)."""
    measure = problem.measures[place]
    if problem.is_assignment:
        target = _mean(problem, couplings, [other for other in range(len(couplings)) if other != place])
    else:
        # Soft couplings: only the barycenter itself, held fixed, is sure to give a step that lowers the objective.
        target = _mean(problem, couplings, range(len(couplings)))
    mass = uniform_mass(problem.size, measure.mass)
    return couple(ground_cost(target, measure.support), mass, measure.mass, couplings[place])


def _with_weightless(problem: BarycenterProblem, couplings: Sequence[Coupling]) -> tuple[Coupling, ...]:
    """Returns the couplings with sources of no weight aligned with the others, which the objective cannot ask for."""
    current = list(couplings)
    for place, weight in enumerate(problem.model_weights):
        if weight == 0:
            current[place] = _realigned(problem, current, place)
    return in_order_of(current, 0)


def _mean(problem: BarycenterProblem, couplings: Sequence[Coupling], places: Sequence[int]) -> Float[Tensor, "m d"]:
    """Returns the weighted mean of some aligned supports; the first one where none of them has a weight."""
    weights = [problem.model_weights[place] for place in places]
    total = sum(weights)
    if total == 0:
        weights, total = [1.0] + [0.0] * (len(weights) - 1), 1.0
    part = replace(
        problem,
        measures=tuple(
            NeuronMeasure(problem.measures[place].support, problem.measures[place].mass) for place in places
        ),
        model_weights=tuple(weight / total for weight in weights),
    )
    return fused_measure(part, [couplings[place] for place in places]).support


def _barycenter(
    problem: BarycenterProblem, couplings: Sequence[Coupling], trace: Sequence[float], status: Status
) -> Barycenter:
    support = _mean(problem, couplings, range(len(couplings)))
    cost = barycenter_cost(problem, couplings, support)
    measure = NeuronMeasure.uniform(support)
    return Barycenter(measure, tuple(couplings), cost, status, {"objective": [*trace, cost]})
