"""Greedy matching: the two neurons nearest to each other are paired first, then the nearest two of the others."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

import mergekit_ot as mergeot


@mergeot.hookimpl
def mergeot_solvers() -> Mapping[str, str]:
    """Return the solver by name, for ``--solver greedy``."""
    return {"greedy": "example_greedy_matching:GreedySolver"}


@dataclass(frozen=True)
class GreedySolver(mergeot.AbstractBarycenterSolver):
    """Pairs neurons with the heaviest source of the fused size, a share greedily, and assigns the others exactly."""

    name = "greedy"
    summary = "greedy matching with the heaviest source: the nearest neurons are paired first"
    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise mergeot.RecipeError(f"Option share={self.share} of 'greedy' is out of range. Take 0 to 1.")

    def find(self, problem: mergeot.BarycenterProblem) -> list[mergeot.Coupling]:
        """Returns one coupling per source."""
        if not problem.fitting:
            raise mergeot.SolverError(f"'greedy' needs a source of {problem.size} neurons. Take the solver 'wb'.")
        target = problem.measures[max(problem.fitting, key=lambda place: problem.model_weights[place])].support
        return [self._coupled(target, source) for source in problem.measures]

    def _coupled(self, target: torch.Tensor, source: mergeot.NeuronMeasure) -> mergeot.Coupling:
        cost = mergeot.ground_cost(target, source.support)  # [fused neuron, source neuron]
        if cost.shape[0] != cost.shape[1] or not source.is_uniform:
            return mergeot.couple(cost, None, source.mass)  # pairs cannot have these masses, a transport plan can
        order = torch.arange(len(cost), device=cost.device)
        index, rows, columns, remaining = order.clone(), order, order, cost
        while len(rows):
            nearest, nearest_row = remaining.argmin(1), remaining.argmin(0)
            # Two that are nearest to each other are paired whatever happens elsewhere: all such pairs at once.
            is_open, is_free = nearest_row[nearest] != order[: len(rows)], nearest[nearest_row] != order[: len(rows)]
            index[rows[~is_open]] = columns[nearest[~is_open]]
            rows, columns, remaining = rows[is_open], columns[is_free], remaining[is_open][:, is_free]
        late = cost.gather(1, index[:, None])[:, 0].argsort()[round(self.share * len(index)) :]
        index[late] = index[late][mergeot.couple(cost[late][:, index[late]]).partners()]
        return mergeot.Permutation(index)
