"""Realigning one source after the other with the mean of the others, with all that a group allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from mergekit_ot.transport.barycenter import fused_measure, rounding_error, support_barycenter
from mergekit_ot.transport.coupling import Coupling
from mergekit_ot.transport.directions import couple_rows
from mergekit_ot.transport.problem import Barycenter, BarycenterProblem, Status


def realign(problem: BarycenterProblem, couplings: Sequence[Coupling], max_steps: int) -> Barycenter:
    """Realigns one source after the other, until a round changes nothing; the objective never rises.

    Args:
        problem: The fusion of a group; structures are not looked at.
        couplings: Where the search starts.
        max_steps: Rounds at most.

    Raises:
        SolverError: Neurons may be rotated, and a source has more of them than are fused.

    Example:
        >>> import torch
        >>> from mergekit_ot import NeuronMeasure, Permutation
        >>> measures = tuple(NeuronMeasure.uniform(torch.tensor(rows)) for rows in ([[0.0], [2.0]], [[3.0], [0.0]]))
        >>> found = realign(BarycenterProblem(measures, (0.5, 0.5), size=2), [Permutation.identity(2)] * 2, 100)
        >>> found.cost, found.couplings[1].partners().tolist()
        (0.125, [1, 0])
    """
    best = support_barycenter(problem, couplings)
    for _ in range(max_steps):
        current = list(best.couplings)
        # Exact couplings are relative to the first source, which need not move.
        for place in range(int(_are_exact(current)), len(current)):
            current[place] = realigned(problem, current, place)
        step = support_barycenter(problem, current, best.stats["objective"])
        if not step.cost < best.cost - rounding_error(problem):
            return replace(best, status=Status.CONVERGED)
        best = step
    return best


def realigned(problem: BarycenterProblem, couplings: Sequence[Coupling], place: int) -> Coupling:
    """Returns the best coupling of one source with the mean of the others; of soft ones, with the mean of all.

    Args:
        problem: The fusion of a group.
        couplings: Those in force.
        place: Which source.

    Raises:
        SolverError: Neurons may be rotated, and the source has more of them than are fused.

    Example:
        >>> import torch
        >>> from mergekit_ot import NeuronMeasure, Permutation
        >>> measures = tuple(NeuronMeasure.uniform(torch.tensor(rows)) for rows in ([[0.0], [2.0]], [[3.0], [0.0]]))
        >>> problem = BarycenterProblem(measures, (0.5, 0.5), size=2)
        >>> realigned(problem, [Permutation.identity(2)] * 2, 1).partners().tolist()
        [1, 0]
    """
    others = [other for other, weight in enumerate(problem.model_weights) if other != place and weight > 0]
    # Soft couplings: only the barycenter itself, held fixed, is sure to give a step that lowers the objective.
    places = others if others and _are_exact(couplings) else range(len(couplings))
    return couple_rows(_mean(problem, couplings, places), problem.measures[place], couplings[place])


def _are_exact(couplings: Sequence[Coupling]) -> bool:
    return all(coupling.is_exact for coupling in couplings)


def _mean(problem: BarycenterProblem, couplings: Sequence[Coupling], places: Sequence[int]) -> Float[Tensor, "m d"]:
    """Returns the weighted mean of some aligned supports; the first one where none of them has a weight."""
    weights = [problem.model_weights[place] for place in places]
    total = sum(weights)
    if total == 0:
        weights, total = [1.0] + [0.0] * (len(weights) - 1), 1.0
    part = replace(
        problem,
        measures=tuple(replace(problem.measures[place], structure=None) for place in places),
        model_weights=tuple(weight / total for weight in weights),
    )
    return fused_measure(part, [couplings[place] for place in places]).support
