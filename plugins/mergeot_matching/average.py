"""Vanilla averaging: neuron by neuron, in the order the sources happen to have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mergekit_ot import (
    AbstractBarycenterSolver,
    Barycenter,
    BarycenterProblem,
    Coupling,
    SolverError,
    Start,
    Status,
    barycenter_cost,
    fused_measure,
    unsolved,
)


@dataclass(frozen=True)
class AverageSolver(AbstractBarycenterSolver):
    """Couples every source with the fused group by the identity; the baseline of every other solver."""

    name: ClassVar[str] = "average"
    summary: ClassVar[str] = "vanilla averaging: no alignment"
    start: ClassVar[Start] = Start.IDENTITY
    max_sweeps: ClassVar[int] = 0

    def solve(self, problem: BarycenterProblem) -> Barycenter:
        """Returns the weighted mean of the measures as they stand.

        Raises:
            SolverError: The sizes differ.
        """
        sizes = [measure.size for measure in problem.measures]
        if any(size != problem.size for size in sizes):
            raise SolverError(
                f"Vanilla averaging needs groups of equal size; the sources have {sizes} neurons and the fused group "
                f"{problem.size}. Take a solver that couples different sizes, such as 'wb'."
            )
        failure = unsolved(problem)
        if failure is not None:
            return failure
        couplings = tuple(Coupling.identity(problem.size, measure.support.device) for measure in problem.measures)
        measure = fused_measure(problem, couplings)
        cost = barycenter_cost(problem, couplings, measure.support)
        return Barycenter(measure, couplings, cost, Status.CONVERGED, {"objective": [cost]})
