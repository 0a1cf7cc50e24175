"""Weight matching (arXiv:2209.04836) and activation matching: one core, two descriptions of a neuron.

The core aligns every source with the first one, and for more than two sources goes on by coordinate ascent. What
makes a method of it is how neurons are seen:

- incident weights, from the identity, sweep after sweep: weight matching;
- responses to calibration data, from nothing, in one sweep: activation matching.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le

from mergekit_ot import (
    AbstractBarycenterSolver,
    BarycenterProblem,
    Coupling,
    PairCosts,
    Permutation,
    Scope,
    Solution,
    Start,
    Status,
    couple,
    couple_rows,
    ground_cost,
    in_order_of,
    measure_cost,
    realign,
    realigned,
    rounding_error,
    transport_cost,
)

# So many times the rounding of an objective is far from it.
_FAR = 1e3


@dataclass(frozen=True)
class AbstractMatchingSolver(AbstractBarycenterSolver):
    """Aligns each source with the weighted mean of the others; the first keeps its order.

    Two sources need one assignment. With more, coordinate ascent never worsens the objective
    ``Σ_i λ_i ⟨Π_i, C_i⟩``, which is the weighted sum of squared distances of all pairs of aligned sources.

    Attributes:
        max_steps: Rounds of coordinate ascent at most.
        symmetry: What neurons may be besides reordered: nothing (``permutation``), negated (``sign``), or rotated as
            well (``all``), each where the network computes the same.
    """

    max_steps: Annotated[int, Ge(1), Le(1_000_000)] = 100
    symmetry: Literal["permutation", "sign", "all"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "uses_signs", self.symmetry != "permutation")  # the class is frozen
        object.__setattr__(self, "uses_rotations", self.symmetry == "all")

    def find(self, problem: BarycenterProblem) -> Solution:
        """Returns couplings under which the sources are aligned; an ascent from those in force is a candidate.

        Raises:
            SolverError: No source has the size of the fused group.
        """
        first = problem.first_fitting(
            f"'{self.name}' starts at a source of that size. Choose another target, or the solver 'wb'."
        )
        is_plain = all(measure.signs is None for measure in problem.measures)
        if is_plain and problem.is_assignment and len(problem.measures) == 2:
            return _matched_pair(problem)
        if is_plain and problem.is_assignment:
            return self._ascended(problem)
        aligned = _coupled_with(problem, first)
        best = realign(problem, aligned, self.max_steps)
        if problem.initial is not None:
            in_force = realign(problem, problem.initial, self.max_steps)
            if in_force.cost <= best.cost + rounding_error(problem):
                best = in_force
        return Solution(_with_weightless(problem, best.couplings), best.status, best.stats, reference=0)

    def _ascended(self, problem: BarycenterProblem) -> Solution:
        """Returns permutations, found on the costs of pairs, from the couplings in force where there are some."""
        costs = PairCosts(problem)
        initial = problem.initial or ()
        is_kept = bool(initial) and all(coupling.is_permutation for coupling in initial)
        couplings, trace = costs.ascend(in_order_of(initial, 0) if is_kept else costs.in_turn(), self.max_steps)
        for place in set(range(len(couplings))) - set(problem.counting):
            couplings[place] = costs.realigned(place, couplings)
        status = Status.CONVERGED if len(trace) <= self.max_steps else Status.MAX_STEPS
        # Near rounding, a sum of differences keeps digits that norms have lost.
        is_far = problem.measures[0].joined is None and trace[-1] > _FAR * rounding_error(problem)
        objective = costs.objective if is_far else None
        return Solution(tuple(couplings), status, {"objective": trace}, objective, reference=0)


@dataclass(frozen=True)
class WeightMatchingSolver(AbstractMatchingSolver):
    """Matches neurons by every weight that touches them, in sweeps from the identity (arXiv:2209.04836)."""

    name = "weight-matching"
    summary = "assignment on incident weights, swept until no gain (Git Re-Basin, arXiv:2209.04836)"
    scope = Scope.INCIDENT
    start = Start.IDENTITY
    tries_nothing = True
    is_order_random = True
    is_settled = True
    max_sweeps = 100


@dataclass(frozen=True)
class ActivationMatchingSolver(AbstractMatchingSolver):
    """Matches neurons by their responses to calibration data, in one sweep."""

    name = "activation-matching"
    summary = "assignment on responses to calibration data (arXiv:2209.04836)"
    measure = "activations"


def _matched_pair(problem: BarycenterProblem) -> Solution:
    """Returns the couplings of two sources of one size: one product and one assignment solve it.

    For two sources ``Σ_i λ_i |w - V_i|²`` is ``λ_1 λ_2 |V_1 - P V_2|²``, so no barycenter is needed for the cost.
    """
    first, second = problem.measures
    weight = problem.model_weights[0] * problem.model_weights[1]
    is_deferred = first.deferred is not None
    cost = measure_cost(first, second) if is_deferred else ground_cost(first.support, second.support)
    room = rounding_error(problem)
    rows = torch.arange(problem.size, device=cost.device)

    def objective(couplings: Sequence[Coupling]) -> float:
        if weight == 0:
            return 0.0
        coupling = in_order_of(couplings, 0)[1]
        total = float(cost[rows, coupling.partners()].double().mean()) if coupling.is_permutation else math.inf
        # Near rounding, a sum of differences keeps digits that norms have lost.
        if first.joined is None and coupling.is_permutation and total > _FAR * room:
            return weight * total
        return weight * transport_cost(coupling, first.support, second.support)

    prefer = None if problem.initial is None else in_order_of(problem.initial, 0)[1]
    coupling = couple(cost, prefer=prefer)
    couplings = (Permutation.identity(problem.size, cost.device), coupling)
    return Solution(couplings, objective=objective, reference=0)


def _coupled_with(problem: BarycenterProblem, first: int) -> tuple[Coupling, ...]:
    """Returns couplings of all sources with one of them, which itself stays as it is."""
    reference = problem.measures[first]
    return tuple(
        Permutation.identity(problem.size, reference.mass.device)
        if place == first and reference.is_uniform
        else couple_rows(reference.support, measure, None if problem.initial is None else problem.initial[place])
        for place, measure in enumerate(problem.measures)
    )


def _with_weightless(problem: BarycenterProblem, couplings: Sequence[Coupling]) -> tuple[Coupling, ...]:
    """Returns the couplings with sources of no weight aligned with the others, which the objective cannot ask for."""
    current = list(couplings)
    for place, weight in enumerate(problem.model_weights):
        if weight == 0:
            current[place] = realigned(problem, current, place)
    return tuple(current)
