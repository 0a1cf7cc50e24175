"""Greedy matching: the two neurons nearest to each other are paired first, then the nearest two of the others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

import mergekit_ot as mergeot


@mergeot.hookimpl
def mergeot_solvers() -> Mapping[str, str]:
    """Return the solver by name, for ``--solver greedy``."""
    return {"greedy": "example_greedy_matching:GreedySolver"}


@dataclass(frozen=True)
class GreedySolver(mergeot.AbstractBarycenterSolver):
    """Pairs the neurons of every source with those of the heaviest source of the fused size, the nearest first.

    Attributes:
        share: Share of the pairs, from the nearest on, that are kept; the neurons of the others are assigned exactly.
    """

    name: ClassVar[str] = "greedy"
    summary: ClassVar[str] = "greedy matching with the heaviest source: the nearest neurons are paired first"

    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise mergeot.RecipeError(f"Option share={self.share} of 'greedy' is out of range. Take 0 to 1.")

    def solve(self, problem: mergeot.BarycenterProblem) -> mergeot.Barycenter:
        """Returns the mean of the coupled sources, or of the couplings in force where those cost no more."""
        if (failure := mergeot.unsolved(problem)) is not None:  # a row that holds NaN or infinity
            return failure
        fitting = [place for place, measure in enumerate(problem.measures) if measure.size == problem.size]
        if not fitting:
            raise mergeot.SolverError(f"'greedy' needs a source of {problem.size} neurons. Take the solver 'wb'.")
        target = problem.measures[max(fitting, key=lambda place: problem.model_weights[place])].support
        found = tuple(self._coupled(target, source) for source in problem.measures)
        candidates = [found] if problem.initial is None else [problem.initial, found]
        measures = [mergeot.fused_measure(problem, couplings) for couplings in candidates]
        costs = [mergeot.barycenter_cost(problem, c, m.support) for c, m in zip(candidates, measures, strict=True)]
        best = costs.index(min(costs))
        return mergeot.Barycenter(measures[best], candidates[best], costs[best], mergeot.Status.CONVERGED)

    def _coupled(self, target: torch.Tensor, source: mergeot.NeuronMeasure) -> mergeot.Coupling:
        cost = mergeot.ground_cost(target, source.support)  # [fused neuron, source neuron]
        if cost.shape[0] != cost.shape[1] or not (source.is_uniform and cost.isfinite().all()):
            # Pairs cannot have these masses, a transport plan can. A cost that is not finite is refused there.
            return mergeot.couple(cost, None, source.mass)
        order = torch.arange(len(cost), device=cost.device)
        index, rows, columns, remaining = order.clone(), order, order, cost
        while len(rows):
            nearest, nearest_row = remaining.argmin(1), remaining.argmin(0)
            # Two that are nearest to each other are paired whatever happens elsewhere: all such pairs at once.
            is_open, is_free = nearest_row[nearest] != order[: len(rows)], nearest[nearest_row] != order[: len(rows)]
            index[rows[~is_open]] = columns[nearest[~is_open]]
            rows, columns, remaining = rows[is_open], columns[is_free], remaining[is_open][:, is_free]
        late = cost.gather(1, index[:, None])[:, 0].argsort()[round(self.share * len(index)) :]
        index[late] = index[late][mergeot.couple(cost[late][:, index[late]]).index]
        return mergeot.Coupling(index=index)
