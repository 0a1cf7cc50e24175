"""Neurons without a partner kept apart, where the structure has a say in who is whose partner."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mergekit_ot import BarycenterProblem, Coupling, NeuronMeasure, couple_apart, placed_measure
from mergeot_gromov.pairwise import FusedGromov

Search = Callable[[NeuronMeasure, NeuronMeasure], tuple[FusedGromov, Coupling]]


def kept_apart(problem: BarycenterProblem, search: Search) -> tuple[Coupling, ...]:
    """Returns partial couplings into a group with room to spare.

    Which neurons come together is read off the best coupling of the fused neurons so far with the next source: the
    cost of a pair is its share of the fused cost there.

    Args:
        problem: The fusion of a group.
        search: Couples a target with a source, and returns the pair's problem with it.
    """

    def cost(placed: Sequence[Coupling | None], source: int, occupied: Tensor) -> tuple[Tensor, Tensor | None]:
        fused, total = placed_measure(problem, placed)
        structure = None if fused.structure is None else fused.structure[:, occupied][:, :, occupied]
        measure = problem.measures[source]
        target = NeuronMeasure.uniform(fused.support[occupied], structure, measure.signs)
        pair, coupling = search(target, measure)
        found, sign = pair.pair_cost(pair.at(coupling))
        own = problem.model_weights[source]
        factor = own * total[occupied] / (own + total[occupied]) if own > 0 else torch.ones_like(total[occupied])
        return found * factor[:, None], sign

    couplings = couple_apart([measure.size for measure in problem.measures], problem.size, cost)
    return tuple(coupling.to(problem.measures[0].support) for coupling in couplings)
