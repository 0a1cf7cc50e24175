"""What the solvers of this package share: couplings by the fused Gromov-Wasserstein objective, and their descent."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from mergekit_ot import (
    AbstractBarycenterSolver,
    Barycenter,
    BarycenterProblem,
    Coupling,
    NeuronMeasure,
    Permutation,
    Scope,
    Solution,
    Status,
    fused_measure,
    has_room,
)
from mergeot_gromov.apart import kept_apart
from mergeot_gromov.exchange import exchange
from mergeot_gromov.pairwise import FusedGromov
from mergeot_gromov.points import Point
from mergeot_gromov.search import (
    alternating_gradient,
    frank_wolfe,
    frank_wolfe_from,
    is_clear,
    polish,
    side_by_side,
    starting_points,
)
from mergeot_gromov.starts import FoundPairs, starting_measures

# Starts that are followed to the end, at least.
_DESCENTS = 3
# Of them, those that are followed to the end of exchanges, which take longer than all before.
_FINISHED = 2


@dataclass(frozen=True)
class AbstractGromovSolver(AbstractBarycenterSolver):
    """Alternates fused Gromov-Wasserstein couplings with the support and structure they imply.

    The structure is an arbitrary, asymmetric matrix (recurrent weights), or the distances between the neurons' own
    weight vectors where a group does not refer to itself. The objective never rises.

    Where the network allows neurons to be negated (tanh, and the cells of RNN, LSTM and GRU), each is coupled at its
    better sign.

    Attributes:
        alpha: Weight of the structure. 1 is plain squared Frobenius matching; 2 counts a recurrent weight at both of
            the neurons that it connects; about 4 is what the authors of arXiv:2210.06671 take.
        gradient: ``full``, or ``half`` for only the first of its two terms, as the paper's authors use.
        epsilon: Regularisation of the BAPG start, relative to a typical entry of the gradient; 0 leaves it out.
        max_steps: Steps at most, of the barycenter and of each Frank-Wolfe run in it.
        random_starts: Random starting points beside the others, for asymmetric structure, where no match is clear.
        starts: How many sources to start from, the best is kept; 0 tries each in turn.
        keep_apart: Whether neurons without a partner are kept apart where the fused group has room.
        signs: Whether neurons may be negated where the network allows it.
        outgoing: Whether a neuron is seen by what reads it too, where that is aligned (the outputs, in one sweep).
        max_sweeps: Sweeps over the groups at most; from the second on, neurons are seen by all their weights.
        members: Which layers of a residual stream describe its neurons: ``all``, or the ``first`` (the authors').
        scaling: ``density``, or ``paper`` to compare and average weights between different widths as they are.
    """

    alpha: Annotated[float, Ge(0), Le(1_000_000_000)] = 2.0
    gradient: Literal["full", "half"] = "full"
    epsilon: Annotated[float, Ge(0)] = 0.1
    max_steps: Annotated[int, Ge(1), Le(1_000_000)] = 100
    random_starts: Annotated[int, Ge(0), Le(1_000_000)] = 8
    starts: Annotated[int, Ge(0)] = 0
    keep_apart: bool = True
    signs: bool = True
    outgoing: bool = True
    max_sweeps: Annotated[int, Ge(1), Le(1_000_000)] = 1
    members: Literal["all", "first"] = "all"
    scaling: Literal["density", "paper"] = "density"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "scope", Scope.INCIDENT if self.outgoing else Scope.INCOMING)
        object.__setattr__(self, "structure_weight", self.alpha)
        object.__setattr__(self, "uses_signs", self.signs)

    def from_all_starts(self, problem: BarycenterProblem) -> Solution:
        """Returns the best couplings over all starts; a descent from those in force is one of them."""
        if self.keep_apart and has_room(problem):
            return Solution(kept_apart(problem, self._paired))
        starts = list(starting_measures(problem))
        limit = self.starts or len(starts)
        from_starts = self._from_starts(problem, starts[:limit])
        in_force = () if problem.initial is None else (problem.initial,)
        descents = itertools.chain((self.descend(problem, couplings) for couplings in in_force), from_starts)
        best = next(descents)
        for descent in descents:
            if descent.cost < best.cost - _slack(descent):
                best = descent
        trace = best.stats["objective"]
        return self.solution(problem, best, {"starts": min(limit, len(starts)), "steps": len(trace)})

    def solution(self, problem: BarycenterProblem, best: Barycenter, stats: Mapping[str, int]) -> Solution:
        """Returns the couplings of a barycenter, with those sources coupled that have no weight, and so had no part."""
        couplings = list(best.couplings)
        is_new = problem.initial is None or any(
            new is not old for new, old in zip(couplings, problem.initial, strict=True)
        )
        for place in set(range(len(couplings))) - set(problem.counting) if is_new else ():
            couplings[place] = self._search(best.measure, problem.measures[place])
        objective = functools.partial(self.objective, problem)
        return Solution(tuple(couplings), best.status, {**best.stats, **stats}, objective)

    def objective(self, problem: BarycenterProblem, couplings: Sequence[Coupling]) -> float:
        """Returns the fused cost ``Σ_i λ_i J(Π_i)`` against the barycenter that the couplings imply."""
        return self._barycenter(problem, couplings).cost

    def descend(self, problem: BarycenterProblem, couplings: Sequence[Coupling]) -> Barycenter:
        """Improves each coupling against the current barycenter, from where it is, until none improves."""
        return self._descended(problem, self._barycenter(problem, couplings), is_exchanged=True)

    def _descended(self, problem: BarycenterProblem, best: Barycenter, is_exchanged: bool) -> Barycenter:
        settled: dict[int, Sequence[Coupling]] = {}
        for _ in range(self.max_steps - 1):
            current = list(best.couplings)
            for place in problem.counting:
                if _are_same(settled.get(place, ()), current):
                    continue
                target = self._target(problem, current, place, best)
                end = self._improved(self._pair(target, problem.measures[place]), current[place], is_exchanged)
                if end is current[place] and target is not best.measure:
                    settled[place] = tuple(current)
                current[place] = end
            step = self._barycenter(problem, current, best.stats["objective"])
            if not step.cost < best.cost - _slack(best):
                return replace(best, status=Status.CONVERGED)
            best = step
        return best

    def _from_starts(
        self, problem: BarycenterProblem, starts: Sequence[tuple[NeuronMeasure, int | None]]
    ) -> Iterator[Barycenter]:
        """Yields where the descent ends from the better half of the starts, or from a few."""
        is_solved = starts[0][1] is not None and problem.is_assignment and len(problem.counting) <= 2
        begun = sorted(self._begun(problem, starts, is_exchanged=is_solved), key=lambda barycenter: barycenter.cost)
        if is_solved:
            # Two sources: eliminating the barycenter leaves the problem of coupling them, which is solved.
            yield from (replace(barycenter, status=Status.CONVERGED) for barycenter in begun)
            return
        followed = begun[: max(_DESCENTS, (len(begun) + 1) // 2)]
        ended = sorted(
            (self._descended(problem, barycenter, is_exchanged=False) for barycenter in followed),
            key=lambda barycenter: barycenter.cost,
        )
        can_exchange = not self._is_half and any(coupling.is_permutation for coupling in ended[0].couplings)
        for barycenter in ended[:_FINISHED]:
            yield self._descended(problem, barycenter, is_exchanged=True) if can_exchange else barycenter

    def _begun(
        self, problem: BarycenterProblem, starts: Sequence[tuple[NeuronMeasure, int | None]], is_exchanged: bool
    ) -> Iterator[Barycenter]:
        """Yields what each start couples with the sources; that of the first alone, where all of it is clear."""
        found = FoundPairs()
        for target, anchor in starts:
            placeholder = Permutation.identity(problem.size, target.support.device)
            couplings: list[Coupling] = [placeholder] * len(problem.measures)
            # Random starts are for the first: the descent leads from the others to couplings as good.
            random_starts = 0 if found.couplings and anchor is not None else self.random_starts
            for place in problem.counting:
                if place == anchor:
                    continue
                known = found.inverse(anchor, place)
                if known is None:
                    known, is_clear = self._match(target, problem.measures[place], random_starts, is_exchanged)
                    found.add(anchor, place, known, is_clear)
                couplings[place] = known
            yield self._barycenter(problem, couplings)
            if found.is_clear:
                return

    def _target(
        self, problem: BarycenterProblem, couplings: Sequence[Coupling], place: int, best: Barycenter
    ) -> NeuronMeasure:
        """Returns what a source is coupled with: the barycenter, or of permutations the mean of the other sources.

        The barycenter is drawn to where the source lies already. For permutations, leaving the source out changes the
        objective by a constant and a factor only, and lets it move.
        """
        others = [1.0 * (other != place) * weight for other, weight in enumerate(problem.model_weights)]
        total = sum(others)
        if total == 0 or not all(coupling.is_permutation for coupling in couplings):
            return best.measure
        return fused_measure(replace(problem, model_weights=tuple(each / total for each in others)), couplings)

    def _paired(self, target: NeuronMeasure, source: NeuronMeasure) -> tuple[FusedGromov, Coupling]:
        return self._pair(target, source), self._search(target, source)

    def _search(self, target: NeuronMeasure, source: NeuronMeasure) -> Coupling:
        """Returns the best coupling from all starting points; the identity where none is better."""
        return self._match(target, source, self.random_starts, is_exchanged=True)[0]

    def _match(
        self, target: NeuronMeasure, source: NeuronMeasure, random_starts: int, is_exchanged: bool
    ) -> tuple[Coupling, bool]:
        """Returns the best coupling from all starting points, and whether it is clear that none is better."""
        pair = self._pair(target, source)
        is_assignment = target.size == source.size and source.is_uniform
        identity = Permutation.identity(target.size, source.support.device) if is_assignment else None
        if not pair.has_structure:
            return pair.corner(pair.linear, identity).as_coupling(), False
        needs_vertex = pair.has_signs or is_assignment
        ends = self._ends(pair, needs_vertex, random_starts)
        best = next(ends) if identity is None else pair.at(identity)
        value = pair.objective(best)
        for end in ends:
            lower = pair.objective(end)
            if lower < value - pair.slack:
                best, value = end, lower
            if is_clear(pair, best):
                return best.as_coupling(), True
        # From couplings by distances, descents lead as far without.
        if is_assignment and (is_exchanged or not pair.is_symmetric) and not self._is_half:
            best = self._exchanged(pair, best)
        return best.as_coupling(), False

    def _ends(self, pair: FusedGromov, needs_vertex: bool, random_starts: int) -> Iterator[Point]:
        """Yields where each search ends, that first which finds a planted match through the most noise."""
        if self.epsilon > 0 and not (pair.is_symmetric and pair.is_square):
            # BAPG's plan has inexact rows, so only the vertex next to it is a candidate.
            near = alternating_gradient(pair, self.epsilon)
            yield polish(pair, pair.corner(pair.gradient(near)), self.max_steps, needs_vertex)
        starts = starting_points(pair, random_starts)
        while batch := list(itertools.islice(starts, side_by_side(pair))):
            for end in frank_wolfe_from(pair, batch, self.max_steps, is_rounded=needs_vertex):
                yield polish(pair, end, self.max_steps, needs_vertex)

    def _exchanged(self, pair: FusedGromov, point: Point) -> Point:
        """Returns a permutation that neither an exchange of two partners improves, nor an assignment."""
        for _ in range(self.max_steps):
            start, point = point, exchange(pair, point, self.max_steps)
            if point is start:
                break
            start, point = point, polish(pair, point, self.max_steps, needs_vertex=True)
            if point is start:
                break
        return point

    def _improved(self, pair: FusedGromov, coupling: Coupling, is_exchanged: bool) -> Coupling:
        start = pair.at(coupling)
        if not pair.has_structure:
            end = pair.corner(pair.linear, coupling)
        else:
            needs_vertex = coupling.is_permutation or pair.has_signs
            end = frank_wolfe(pair, start, self.max_steps)
            if end.coupling is None:
                # A vertex where it ends is one from which no assignment leads on.
                end = polish(pair, end, self.max_steps, needs_vertex)
            if is_exchanged and coupling.is_permutation and not self._is_half:
                end = self._exchanged(pair, end)
        return end.as_coupling() if pair.objective(end) < pair.objective(start) - pair.slack else coupling

    def _pair(self, target: NeuronMeasure, source: NeuronMeasure) -> FusedGromov:
        return FusedGromov(target, source, self.alpha, self._is_half)

    @property
    def _is_half(self) -> bool:
        return self.gradient == "half"

    def _barycenter(
        self, problem: BarycenterProblem, couplings: Sequence[Coupling], trace: Sequence[float] = ()
    ) -> Barycenter:
        measure = fused_measure(problem, couplings)
        cost = sum(
            weight * self._cost(coupling, measure, source)
            for weight, coupling, source in zip(problem.model_weights, couplings, problem.measures, strict=True)
            if weight > 0
        )
        return Barycenter(measure, tuple(couplings), cost, Status.MAX_STEPS, {"objective": [*trace, cost]})

    def _cost(self, coupling: Coupling, target: NeuronMeasure, source: NeuronMeasure) -> float:
        """Returns the fused cost of one coupling; summed as differences where it is exact, to keep digits."""
        if not coupling.is_exact:
            pair = self._pair(target, source)
            return pair.objective(pair.at(coupling))
        moved = fused_measure(BarycenterProblem((source,), (1.0,), target.size), (coupling,))
        cost = _squared_distance(target.support, moved.support)
        if self.alpha > 0 and target.structure is not None and moved.structure is not None:
            cost += self.alpha * _squared_distance(target.structure, moved.structure)
        return cost / max(target.size, 1)


def _squared_distance(one: Tensor, other: Tensor) -> float:
    dtype = torch.promote_types(one.dtype, torch.float32)
    return float(torch.linalg.vector_norm(one.to(dtype) - other.to(dtype))) ** 2


def _are_same(some: Sequence[Coupling], others: Sequence[Coupling]) -> bool:
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))


def _slack(barycenter: Barycenter) -> float:
    epsilon = torch.finfo(torch.promote_types(barycenter.measure.support.dtype, torch.float32)).eps
    measure = barycenter.measure
    moment = float(measure.support.square().sum())
    if measure.structure is not None:
        moment += float(measure.structure.square().sum())
    return 8 * epsilon * (moment / max(measure.size, 1) + barycenter.cost)
