"""Vanilla averaging: neuron by neuron, in the order the sources happen to have."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_ot import AbstractBarycenterSolver, BarycenterProblem, Permutation, SolverError, Start


@dataclass(frozen=True)
class AverageSolver(AbstractBarycenterSolver):
    """Couples every source with the fused group by the identity; the baseline of every other solver."""

    name = "average"
    summary = "vanilla averaging: no alignment"
    start = Start.IDENTITY
    max_sweeps = 0

    def find(self, problem: BarycenterProblem) -> tuple[Permutation, ...]:
        """Returns identities.

        Raises:
            SolverError: The sizes differ.
        """
        sizes = [measure.size for measure in problem.measures]
        if any(size != problem.size for size in sizes):
            raise SolverError(
                f"Vanilla averaging needs groups of equal size; the sources have {sizes} neurons and the fused group "
                f"{problem.size}. Take a solver that couples different sizes, such as 'wb'."
            )
        return tuple(Permutation.identity(problem.size, measure.support.device) for measure in problem.measures)
