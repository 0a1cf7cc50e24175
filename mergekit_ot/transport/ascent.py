"""Permutations of several sources, found on the costs of their pairs: no support is looked at in the search."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergekit_ot.transport.coupling import Coupling
from mergekit_ot.transport.ground_cost import couple, measure_cost
from mergekit_ot.transport.permutation import Permutation
from mergekit_ot.transport.problem import BarycenterProblem


class PairCosts:
    """What neurons of every two sources cost together; each pair is worked out once.

    For permutations ``Σ_i λ_i |w - V_i|²`` at the best ``w`` is ``Σ_{i<j} λ_i λ_j |V_i - V_j|²``, and the best partner
    of one source, with the mean of the others, is the best in the sum of its costs with each of them.

    Args:
        problem: Sources of the fused size and of uniform mass.

    Example:
        >>> from mergekit_ot import NeuronMeasure
        >>> rows = ([[0.0], [5.0]], [[5.0], [1.0]], [[0.0], [6.0]])
        >>> measures = tuple(NeuronMeasure.uniform(torch.tensor(each)) for each in rows)
        >>> costs = PairCosts(BarycenterProblem(measures, (0.25, 0.25, 0.5), size=2))
        >>> found, trace = costs.ascend(costs.in_turn(), max_steps=100)
        >>> [coupling.partners().tolist() for coupling in found], trace[-1]
        ([[0, 1], [1, 0], [0, 1]], 0.21875)
    """

    def __init__(self, problem: BarycenterProblem) -> None:
        self.problem, self.weights = problem, problem.model_weights
        self._costs: dict[tuple[int, int], Tensor] = {}
        self._couplings: dict[tuple[int, int], Coupling] = {}

    def between(self, one: int, other: int) -> Float[Tensor, "n n"]:
        """Returns the ground cost of two sources."""
        if one > other:
            return self.between(other, one).T
        if (one, other) not in self._costs:
            measures = self.problem.measures
            self._costs[one, other] = measure_cost(measures[one], measures[other])
        return self._costs[one, other]

    def objective(self, couplings: Sequence[Coupling]) -> float:
        """Returns ``Σ_{i<j} λ_i λ_j`` times the mean cost of aligned neurons of two sources."""
        return sum(
            self.weights[one] * self.weights[other] * self._mean_cost(one, other, couplings)
            for one, other in itertools.combinations(self.problem.counting, 2)
        )

    def in_turn(self) -> list[Coupling]:
        """Returns a start that no order of neurons can spoil: each source is aligned with the mean of those before."""
        couplings: list[Coupling] = []
        for place in range(len(self.weights)):
            others = range(place)
            if place == 0:
                couplings.append(Permutation.identity(self.problem.size, self.problem.measures[0].mass.device))
            else:
                couplings.append(couple(self._cost_with(place, others, couplings)))
        return couplings

    def anchored_at(self, anchor: int) -> list[Coupling]:
        """Returns the best couplings of all sources with one of them, in whose order the fused neurons are."""
        size, device = self.problem.size, self.problem.measures[anchor].mass.device
        couplings: list[Coupling] = []
        for place in range(len(self.weights)):
            pair = min(place, anchor), max(place, anchor)
            if place != anchor and pair not in self._couplings:
                self._couplings[pair] = couple(self.between(*pair))
            index = torch.arange(size, device=device) if place == anchor else self._couplings[pair].partners()
            couplings.append(Permutation(torch.argsort(index) if place < anchor else index))
        return couplings

    def realigned(self, place: int, couplings: Sequence[Coupling]) -> Coupling:
        """Returns the best coupling of one source with all others as they are coupled."""
        others = [other for other in range(len(couplings)) if other != place]
        return couple(self._cost_with(place, others, couplings), prefer=couplings[place])

    def ascend(self, couplings: Sequence[Coupling], max_steps: int) -> tuple[list[Coupling], list[float]]:
        """Realigns one source after the other until none moves; returns couplings, and the objective of each round.

        The objective never rises. At the end each source is at its best beside all others, the first one too, and so
        beside the barycenter. Sources of no weight stay where they are.

        Args:
            couplings: Permutations to start from.
            max_steps: Rounds at most.
        """
        current, trace = list(couplings), [self.objective(couplings)]
        # One that counts alone has nothing to be coupled with.
        moving = self.problem.counting if len(self.problem.counting) > 1 else ()
        seen: dict[int, list[Coupling]] = {}
        for _ in range(max_steps):
            before = list(current)
            for place in moving:
                beside = [current[other] for other in self.problem.counting if other != place]
                if place in seen and all(new is old for new, old in zip(beside, seen[place], strict=True)):
                    continue
                found = self.realigned(place, current)
                current[place] = current[place] if found.is_same(current[place]) else found
                seen[place] = beside
            if all(new is old for new, old in zip(current, before, strict=True)):
                break
            objective = self.objective(current)
            if not objective < trace[-1]:
                return before, trace
            trace.append(objective)
        return current, trace

    def _cost_with(self, place: int, others: Sequence[int], couplings: Sequence[Coupling]) -> Float[Tensor, "n n"]:
        """Returns the costs with the weighted mean of others, up to what is the same for all neurons of the source."""
        weights = {other: self.weights[other] for other in others if self.weights[other] > 0}
        weights = weights or {others[0]: 1.0}
        total = sum(weights.values())
        parts = (
            self._rows(other, place, couplings[other].partners()) * (weight / total)
            for other, weight in weights.items()
        )
        first = next(parts)
        for part in parts:
            first += part
        return first

    def _rows(self, one: int, other: int, index: Int[Tensor, " n"]) -> Float[Tensor, "n n"]:
        cost = self.between(one, other)
        return cost[index.to(cost.device)]

    def _mean_cost(self, one: int, other: int, couplings: Sequence[Coupling]) -> float:
        cost = self.between(one, other)
        rows, columns = (couplings[place].partners().to(cost.device) for place in (one, other))
        return float(cost[rows, columns].double().mean()) if cost.numel() else 0.0
