"""Permutations of several sources, found on the costs of their pairs: no support is looked at in the search."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot.errors import SolverError
from mergekit_ot.transport.assignment import Prices
from mergekit_ot.transport.coupling import Coupling
from mergekit_ot.transport.ground_cost import couple, measure_cost
from mergekit_ot.transport.permutation import Permutation
from mergekit_ot.transport.problem import BarycenterProblem, Status

# Costs of so many neurons are kept in both directions: rows are read much faster than columns.
_BOTH_WAYS = 1024
# Beyond this part of changed rows a cost is added up anew.
_LARGEST_CHANGE = 0.7


@dataclass(frozen=True)
class _Beside:
    """What the neurons of one source cost beside all others, and the partners of the others that it holds for."""

    cost: np.ndarray
    partners: Mapping[int, np.ndarray]


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
        self._arrays: dict[tuple[int, int], np.ndarray] = {}
        self._prices: dict[int, Prices] = {}
        self._largest: dict[tuple[int, int], float] = {}
        self._home = problem.measures[0].mass
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
        indices = {place: _index(couplings[place]) for place in self.problem.counting}
        total = 0.0
        for one, other in itertools.combinations(indices, 2):
            costs = self._array(one, other)[indices[one], indices[other]]
            total += self.weights[one] * self.weights[other] * float(costs.sum(dtype=np.float64))
        return total / max(self.problem.size, 1)

    def in_turn(self) -> list[Coupling]:
        """Returns a start that no order of neurons can spoil: each source is aligned with the mean of those before."""
        couplings: list[Coupling] = [Permutation.identity(self.problem.size, self._home.device)]
        for place in range(1, len(self.weights)):
            beside = self._beside(place, couplings, range(place))
            couplings.append(couple(torch.from_numpy(beside.cost)).to(self._home))
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
        return self._coupled(place, self._beside(place, couplings, self._others(place)), couplings[place])

    def ascend(
        self, couplings: Sequence[Coupling], max_steps: int, settled: int | None = None
    ) -> tuple[list[Coupling], list[float]]:
        """Realigns one source after the other until none moves; returns couplings, and the objective of each round.

        The objective never rises. At the end each source is at its best beside all others, the first one too, and so
        beside the barycenter. Sources of no weight stay where they are.

        Args:
            couplings: Permutations to start from.
            max_steps: Rounds at most.
            settled: A source that is at its best beside the others as they stand, where one is known to be.
        """
        return self._ascended(couplings, max_steps, settled, {}) or (list(couplings), [])

    def ascend_from_each(
        self, anchors: Sequence[int], further: Sequence[Sequence[Coupling]], max_steps: int
    ) -> tuple[list[Coupling], list[float]]:
        """Returns the best of several ascents; one that comes to where another has been goes on no further.

        Args:
            anchors: Sources to start from, all others at their best beside each.
            further: Permutations to start from as well.
            max_steps: Rounds at most of each ascent.
        """
        passed: dict[bytes, int] = {}
        ends = [self._ascended(self.anchored_at(anchor), max_steps, anchor, passed) for anchor in anchors]
        ends += [self._ascended(couplings, max_steps, None, passed) for couplings in further]
        return min((end for end in ends if end is not None), key=lambda end: end[1][-1])

    def _ascended(
        self, couplings: Sequence[Coupling], max_steps: int, settled: int | None, passed: dict[bytes, int]
    ) -> tuple[list[Coupling], list[float]] | None:
        """Returns the end of an ascent; None where it comes to what another one has passed, after no more rounds.

        Args:
            couplings: Permutations to start from.
            max_steps: Rounds at most.
            settled: A source that is at its best.
            passed: After how many rounds which couplings were come to; it is added to.
        """
        ended, trace, states = list(couplings), [], []
        for current in self._rounds(couplings, settled):
            objective = self.objective(current)
            if trace and not objective < trace[-1]:
                break
            states.append(self._state(current))
            if passed.get(states[-1], max_steps + 1) < len(states):
                return None
            ended = current
            trace.append(objective)
            if len(trace) > max_steps:
                break
        for steps, state in enumerate(states):
            passed[state] = min(steps, passed.get(state, steps))
        return ended, trace

    def _state(self, couplings: Sequence[Coupling]) -> bytes:
        """Returns what tells couplings from others, whatever the order of the fused neurons is."""
        digest = hashlib.blake2b(digest_size=16)
        first, *others = (_index(couplings[place]) for place in self.problem.counting)
        order = np.argsort(first)
        for index in others:
            digest.update(index[order].tobytes())
        return digest.digest()

    def _rounds(self, couplings: Sequence[Coupling], settled: int | None) -> Iterator[list[Coupling]]:
        """Yields couplings to start from, and those after each round that moves a source."""
        current, counting = list(couplings), self.problem.counting
        # One that counts alone has nothing to be coupled with.
        moving = counting if len(counting) > 1 else ()
        seen = {} if settled is None else {settled: [current[other] for other in counting if other != settled]}
        costs: dict[int, _Beside] = {}
        is_moved = True
        while is_moved:
            yield list(current)
            is_moved = False
            for place in moving:
                beside = [current[other] for other in counting if other != place]
                if place in seen and all(new is old for new, old in zip(beside, seen[place], strict=True)):
                    continue
                costs[place] = self._beside(place, current, self._others(place), costs.get(place))
                found = self._coupled(place, costs[place], current[place])
                seen[place] = beside
                if not found.is_same(current[place]):
                    current[place], is_moved = found, True

    def _others(self, place: int) -> list[int]:
        return [other for other in range(len(self.weights)) if other != place]

    def _coupled(self, place: int, beside: _Beside, current: Coupling) -> Coupling:
        if place not in self._prices:
            self._prices[place] = Prices(max(self._largest[other, place] for other in beside.partners))
        found = couple(torch.from_numpy(beside.cost), prefer=current, prices=self._prices[place])
        return found if found is current else found.to(self._home)

    def _beside(
        self, place: int, couplings: Sequence[Coupling], others: Sequence[int], last: _Beside | None = None
    ) -> _Beside:
        """Returns the costs with the weighted mean of others, up to what is the same for all neurons of the source.

        Args:
            place: The source.
            couplings: Those of the others.
            others: Which they are.
            last: What was returned before, for the same others; the rows of it that are other ones now are overwritten.
        """
        weights = {other: self.weights[other] for other in others if self.weights[other] > 0}
        weights = weights or {others[0]: 1.0}
        shares = {other: weight / sum(weights.values()) for other, weight in weights.items()}
        partners = {other: _index(couplings[other]) for other in shares}
        if last is None:
            return _Beside(self._sum(place, shares, partners), partners)
        changed = np.flatnonzero(np.logical_or.reduce([partners[other] != last.partners[other] for other in shares]))
        if len(changed) > _LARGEST_CHANGE * self.problem.size:
            return _Beside(self._sum(place, shares, partners), partners)
        last.cost[changed] = self._sum(place, shares, {other: index[changed] for other, index in partners.items()})
        return _Beside(last.cost, partners)

    def _sum(self, place: int, shares: Mapping[int, float], partners: Mapping[int, np.ndarray]) -> np.ndarray:
        """Returns rows of the costs with several others, each with its share."""
        scaled = (self._rows(other, place, partners[other]) * share for other, share in shares.items())
        total = next(scaled)
        for rows in scaled:
            total += rows
        return total

    def _rows(self, one: int, other: int, index: np.ndarray) -> np.ndarray:
        """Returns rows of the costs of two sources."""
        if one > other and self.problem.size > _BOTH_WAYS:
            return np.ascontiguousarray(self._array(other, one).take(index, axis=1).T)
        return self._array(one, other).take(index, axis=0)

    def _array(self, one: int, other: int) -> np.ndarray:
        """Returns the costs of two sources, row after row.

        Raises:
            SolverError: They are not finite.
        """
        if (one, other) not in self._arrays and one < other:
            array = self.between(one, other).detach().cpu().numpy()
            largest = float(array.max(initial=0.0))
            if not math.isfinite(largest):
                raise SolverError(Status.NONFINITE.value)
            self._arrays[one, other] = array
            self._largest[one, other] = self._largest[other, one] = largest
        elif (one, other) not in self._arrays:
            self._arrays[one, other] = np.ascontiguousarray(self._array(other, one).T)
        return self._arrays[one, other]


def _index(coupling: Coupling) -> np.ndarray:
    return coupling.partners().cpu().numpy()
