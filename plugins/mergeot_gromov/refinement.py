"""Refinement: weight matching that sees recurrent weights and signs, from couplings in force."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from mergekit_ot import Barycenter, BarycenterProblem, Start, fused_measure, in_order_of, unsolved
from mergeot_gromov.solver import GromovBarycenterSolver


@dataclass(frozen=True)
class RefinementSolver(GromovBarycenterSolver):
    """Improves the couplings in force, one group after the other in random order, until a sweep changes nothing.

    Each source is realigned with the mean of the others, seen by every tensor that touches the group; where the
    group refers to itself, by Frank-Wolfe and iterated assignments from where it is. The objective never rises. From
    the identity it is the weight matching of arXiv:2209.04836 with the quadratic term of recurrent layers.
    """

    name: ClassVar[str] = "refinement"
    summary: ClassVar[str] = "weight matching with recurrent weights and signs, from the couplings in force (--refine)"
    wants_structure: ClassVar[bool] = False
    start: ClassVar[Start] = Start.IDENTITY
    is_order_random: ClassVar[bool] = True

    alpha: float = 1.0
    max_sweeps: int = 100

    def solve(self, problem: BarycenterProblem) -> Barycenter:
        """Returns the couplings in force, improved; a solution from scratch where there are none."""
        if problem.initial is None:
            return super().solve(problem)
        failure = unsolved(problem)
        if failure is not None:
            return failure
        counting = [place for place, weight in enumerate(problem.model_weights) if weight > 0]
        best = self._descend(problem, self._barycenter(problem, problem.initial, []), counting)
        if all(new is old for new, old in zip(best.couplings, problem.initial, strict=True)):
            return best
        couplings = in_order_of(self._complete(problem, best, counting), counting[0])
        return replace(best, couplings=couplings, measure=fused_measure(problem, couplings))
