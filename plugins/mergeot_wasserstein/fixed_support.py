"""OTFusion (arXiv:1910.05653): every source is transported to one source, whose support stays as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mergekit_ot import (
    AbstractBarycenterSolver,
    Barycenter,
    BarycenterProblem,
    Coupling,
    SolverError,
    Status,
    barycenter_cost,
    fused_measure,
    rounding_error,
    unsolved,
)
from mergeot_wasserstein.entropic import couple_measure


@dataclass(frozen=True)
class FixedSupportSolver(AbstractBarycenterSolver):
    """Couples every source with the first source of the fused group's size.

    Attributes:
        epsilon: Entropic regularisation relative to the mean ground cost; 0 gives exact couplings.
        members: Which layers of a residual stream describe its neurons: ``all``, or the ``first``.
        scaling: ``density``, or ``paper`` to compare and average weights between different widths as they are.
    """

    name: ClassVar[str] = "otfusion"
    summary: ClassVar[str] = "couplings of every source with the first one (OTFusion, arXiv:1910.05653)"

    epsilon: float = 0.0
    members: str = "all"
    scaling: str = "density"

    def solve(self, problem: BarycenterProblem) -> Barycenter:
        """Returns the barycenter whose couplings lead to the fixed support.

        ``cost`` is the transport cost to that support, not to the fused one.

        Raises:
            SolverError: No source has the size of the fused group.
        """
        failure = unsolved(problem)
        if failure is not None:
            return failure
        sizes = [measure.size for measure in problem.measures]
        if problem.size not in sizes:
            raise SolverError(
                f"The fused group has {problem.size} neurons and the sources have {sizes}: 'otfusion' keeps the "
                "support of a source, so one must have that size. Choose another target, or the solver 'wb'."
            )
        fixed = sizes.index(problem.size)
        support = problem.measures[fixed].support
        # A source that is alone has nothing to be blended with, and a soft coupling would only blur it.
        epsilon = 0.0 if max(problem.model_weights) == sum(problem.model_weights) else self.epsilon
        couplings = tuple(
            Coupling.identity(problem.size, support.device)
            if place == fixed and measure.is_uniform
            else couple_measure(support, measure, epsilon)
            for place, measure in enumerate(problem.measures)
        )
        cost = barycenter_cost(problem, couplings, support)
        if problem.initial is not None:
            initial_cost = barycenter_cost(problem, problem.initial, support)
            if initial_cost <= cost + rounding_error(problem):
                couplings, cost = problem.initial, initial_cost
        return Barycenter(fused_measure(problem, couplings), couplings, cost, Status.CONVERGED, {"objective": [cost]})
