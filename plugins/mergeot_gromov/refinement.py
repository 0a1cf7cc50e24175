"""Refinement: weight matching that sees recurrent weights and signs, from couplings in force."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

from mergekit_ot import (
    BarycenterProblem,
    Coupling,
    NeuronMeasure,
    Permutation,
    Solution,
    Start,
    independent_coupling,
    realign,
    uniform_mass,
)
from mergeot_gromov.descent import AbstractGromovSolver


@dataclass(frozen=True)
class RefinementSolver(AbstractGromovSolver):
    """Improves the couplings in force, one group after the other in random order, until a sweep changes nothing.

    Each source is realigned with the mean of the others, seen by every tensor that touches the group; where the
    group refers to itself, by Frank-Wolfe and iterated assignments from where it is. The objective never rises. From
    the identity it is the weight matching of arXiv:2209.04836 with the quadratic term of recurrent layers.

    Attributes:
        symmetry: What neurons may be besides reordered: nothing (``permutation``), negated (``sign``), or rotated as
            well (``all``), each where the network computes the same. Negated they are with `signs` only.
    """

    name = "refinement"
    summary = "weight matching with recurrent weights and signs, from the couplings in force (--refine)"
    refines = True
    own_options = frozenset({"max_sweeps", "outgoing", "starts", "max_steps"})
    start = Start.IDENTITY
    is_order_random = True

    alpha: Annotated[float, Ge(0), Le(1_000_000_000)] = 1.0
    max_sweeps: Annotated[int, Ge(1), Le(1_000_000)] = 100
    symmetry: Literal["permutation", "sign", "all"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "uses_signs", self.signs and self.symmetry != "permutation")  # the class is frozen
        object.__setattr__(self, "uses_rotations", self.symmetry == "all")

    def find(self, problem: BarycenterProblem) -> Solution:
        """Returns the couplings in force, improved; a solution from scratch where there are none."""
        if any(measure.signs is not None and measure.signs.may_rotate for measure in problem.measures):
            return self._rotated(problem)
        if problem.initial is None:
            return self.from_all_starts(problem)
        return self.solution(problem, self.descend(problem, problem.initial), {})

    def _rotated(self, problem: BarycenterProblem) -> Solution:
        """Returns rotations, each source's onto the mean of the others."""
        start = problem.initial or tuple(_as_they_stand(measure, problem.size) for measure in problem.measures)
        if any(measure.size > problem.size for measure in problem.measures):
            return Solution(tuple(start))
        found = realign(problem, start, self.max_steps)
        return Solution(found.couplings, found.status, found.stats)


def _as_they_stand(measure: NeuronMeasure, size: int) -> Coupling:
    if measure.size == size:
        return Permutation.identity(size, measure.mass.device)
    return independent_coupling(uniform_mass(size, measure.mass), measure.mass)
