"""Refinement: weight matching that sees recurrent weights and signs, from couplings in force."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from mergekit_ot import BarycenterProblem, Solution, Start
from mergeot_gromov.descent import AbstractGromovSolver


@dataclass(frozen=True)
class RefinementSolver(AbstractGromovSolver):
    """Improves the couplings in force, one group after the other in random order, until a sweep changes nothing.

    Each source is realigned with the mean of the others, seen by every tensor that touches the group; where the
    group refers to itself, by Frank-Wolfe and iterated assignments from where it is. The objective never rises. From
    the identity it is the weight matching of arXiv:2209.04836 with the quadratic term of recurrent layers.
    """

    name = "refinement"
    summary = "weight matching with recurrent weights and signs, from the couplings in force (--refine)"
    refines = True
    own_options = frozenset({"max_sweeps", "outgoing", "starts", "max_steps"})
    start = Start.IDENTITY
    is_order_random = True

    alpha: Annotated[float, Ge(0), Le(1_000_000_000)] = 1.0
    max_sweeps: Annotated[int, Ge(1), Le(1_000_000)] = 100

    def find(self, problem: BarycenterProblem) -> Solution:
        """Returns the couplings in force, improved; a solution from scratch where there are none."""
        if problem.initial is None:
            return self.from_all_starts(problem)
        return self.solution(problem, self.descend(problem, problem.initial), {})
