"""Fused Gromov-Wasserstein barycenter of neuron measures (arXiv:2210.06671, section on recurrent layers)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mergekit_ot import (
    AbstractBarycenterSolver,
    Barycenter,
    BarycenterProblem,
    Coupling,
    NeuronMeasure,
    RecipeError,
    Scope,
    Status,
    barycenter_cost,
    fused_measure,
    has_room,
    in_order_of,
    unsolved,
)
from mergeot_gromov.apart import kept_apart
from mergeot_gromov.pairwise import FusedGromov
from mergeot_gromov.search import alternating_gradient, frank_wolfe, polish, starting_points


@dataclass(frozen=True)
class GromovBarycenterSolver(AbstractBarycenterSolver):
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
        random_starts: Random starting points beside the others, for asymmetric structure.
        starts: How many sources to start from, the best is kept; 0 tries each in turn.
        keep_apart: Whether neurons without a partner are kept apart where the fused group has room.
        signs: Whether neurons may be negated where the network allows it.
        outgoing: Whether a neuron is seen by what reads it too, where that is aligned (the outputs, in one sweep).
        max_sweeps: Sweeps over the groups at most; from the second on, neurons are seen by all their weights.
        members: Which layers of a residual stream describe its neurons: ``all``, or the ``first`` (the authors').
        scaling: ``density``, or ``paper`` to compare and average weights between different widths as they are.
    """

    name: ClassVar[str] = "gwb"
    summary: ClassVar[str] = "fused Gromov-Wasserstein barycenter with asymmetric structure (arXiv:2210.06671)"
    wants_structure: ClassVar[bool] = True

    alpha: float = 2.0
    gradient: str = "full"
    epsilon: float = 0.1
    max_steps: int = 100
    random_starts: int = 8
    starts: int = 0
    keep_apart: bool = True
    signs: bool = True
    outgoing: bool = True
    max_sweeps: int = 1
    members: str = "all"
    scaling: str = "density"

    def __post_init__(self) -> None:
        if self.gradient not in ("full", "half"):
            raise RecipeError(f"Option gradient='{self.gradient}' of 'gwb' is unknown. Take 'full' or 'half'.")
        if (
            min(self.alpha, self.epsilon, self.starts, self.random_starts) < 0
            or min(self.max_steps, self.max_sweeps) < 1
        ):
            raise RecipeError(
                f"Options of 'gwb' are out of range: {self}. Take none below 0, max_steps and max_sweeps >= 1."
            )

    @property
    def scope(self) -> Scope:
        """Which tensors describe a neuron in the first sweep."""
        return Scope.INCIDENT if self.outgoing else Scope.INCOMING

    @property
    def structure_weight(self) -> float:
        """Weight of recurrent weights in the objective of the whole alignment."""
        return self.alpha

    @property
    def uses_signs(self) -> bool:
        """Whether the solver negates neurons."""
        return self.signs

    def solve(self, problem: BarycenterProblem) -> Barycenter:
        """Returns the best barycenter over all starts, its neurons in the order of the first source that counts."""
        failure = unsolved(problem)
        if failure is not None:
            return failure
        if self.keep_apart and has_room(problem):
            return self._kept_apart(problem)
        counting = [place for place, weight in enumerate(problem.model_weights) if weight > 0]
        best: Barycenter | None = None
        if problem.initial is not None:
            best = self._barycenter(problem, problem.initial, [])
            best = self._descend(problem, best, counting)
        starts = list(_starts(problem, counting))
        limit = self.starts or len(starts)
        for target, anchor in starts[:limit]:
            found = self._from_start(problem, target, anchor, counting)
            if best is None or found.cost < best.cost - _slack(found):
                best = found
        if best is None:
            raise RecipeError("No source has a positive model weight. Give weights that sum to one.")
        couplings = best.couplings
        if couplings is not problem.initial:
            couplings = in_order_of(self._complete(problem, best, counting), counting[0])
        stats = {**best.stats, "starts": min(limit, len(starts)), "steps": len(best.stats["objective"])}  # type: ignore[arg-type]
        return replace(best, couplings=couplings, measure=fused_measure(problem, couplings), stats=stats)

    def _kept_apart(self, problem: BarycenterProblem) -> Barycenter:
        def search(target: NeuronMeasure, source: NeuronMeasure) -> tuple[FusedGromov, Coupling]:
            return self._pair(target, source), self._search(target, source)

        dtype = problem.measures[0].support
        couplings = tuple(
            Coupling(
                plan=coupling.transport_plan(dtype), sign=None if coupling.sign is None else coupling.sign.to(dtype)
            )
            for coupling in kept_apart(problem, search)
        )
        if problem.initial is not None:
            in_force = barycenter_cost(problem, problem.initial, fused_measure(problem, problem.initial).support)
            if in_force <= barycenter_cost(problem, couplings, fused_measure(problem, couplings).support):
                couplings = problem.initial
        measure = fused_measure(problem, couplings)
        cost = barycenter_cost(problem, couplings, measure.support)
        return Barycenter(measure, couplings, cost, Status.CONVERGED, {"objective": [cost]})

    def _from_start(
        self, problem: BarycenterProblem, target: NeuronMeasure, anchor: int | None, counting: Sequence[int]
    ) -> Barycenter:
        placeholder = Coupling.identity(problem.size, target.support.device)
        couplings = [placeholder] * len(problem.measures)
        for place in counting:
            if place != anchor:
                couplings[place] = self._search(target, problem.measures[place])
        found = self._barycenter(problem, tuple(couplings), [])
        if anchor is not None and problem.is_assignment and len(counting) <= 2:
            # Two sources: eliminating the barycenter leaves the problem of coupling them, which is solved.
            return replace(found, status=Status.CONVERGED)
        return self._descend(problem, found, counting)

    def _descend(self, problem: BarycenterProblem, best: Barycenter, counting: Sequence[int]) -> Barycenter:
        """Improves each coupling against the current barycenter, from where it is, until none improves."""
        for _ in range(self.max_steps - 1):
            couplings = list(best.couplings)
            for place in counting:
                target = self._target(problem, couplings, place, best)
                couplings[place] = self._improved(self._pair(target, problem.measures[place]), couplings[place])
            found = self._barycenter(problem, tuple(couplings), best.stats["objective"])  # type: ignore[arg-type]
            if not found.cost < best.cost - _slack(best):
                return replace(best, status=Status.CONVERGED)
            best = found
        return best

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

    def _search(self, target: NeuronMeasure, source: NeuronMeasure, current: Coupling | None = None) -> Coupling:
        """Returns the best coupling from all starting points; the identity, or `current`, where none is better."""
        pair = self._pair(target, source)
        if current is None and target.size == source.size and source.is_uniform:
            current = Coupling.identity(target.size, source.support.device)
        if not pair.has_structure:
            found = pair.corner(pair.linear, current).coupling
            return found if found is not None else Coupling(plan=pair.corner(pair.linear).plan)
        needs_vertex = pair.has_signs or (target.size == source.size and source.is_uniform)
        best = None if current is None else pair.at(current)
        value = float("inf") if best is None else pair.objective(best)
        runs = [frank_wolfe(pair, start, self.max_steps) for start in starting_points(pair, self.random_starts)]
        if self.epsilon > 0:
            # BAPG's plan has inexact rows, so only the vertex next to it is a candidate.
            near = alternating_gradient(pair, self.epsilon)
            runs += [pair.corner(pair.gradient(near))]
        for run in runs:
            found = polish(pair, run, self.max_steps, needs_vertex)
            lower = pair.objective(found)
            if best is None or lower < value - pair.slack:
                best, value = found, lower
        return Coupling(plan=best.plan) if best.coupling is None else best.coupling  # type: ignore[union-attr]

    def _improved(self, pair: FusedGromov, coupling: Coupling) -> Coupling:
        start = pair.at(coupling)
        if not pair.has_structure:
            found = pair.corner(pair.linear, coupling)
        else:
            needs_vertex = coupling.is_permutation or pair.has_signs
            found = polish(pair, frank_wolfe(pair, start, self.max_steps), self.max_steps, needs_vertex)
        if not pair.objective(found) < pair.objective(start) - pair.slack:
            return coupling
        return Coupling(plan=found.plan) if found.coupling is None else found.coupling

    def _complete(self, problem: BarycenterProblem, best: Barycenter, counting: Sequence[int]) -> tuple[Coupling, ...]:
        """Returns the couplings with those sources coupled that have no weight, and so played no part."""
        return tuple(
            coupling if place in counting else self._search(best.measure, measure)
            for place, (coupling, measure) in enumerate(zip(best.couplings, problem.measures, strict=True))
        )

    def _pair(self, target: NeuronMeasure, source: NeuronMeasure) -> FusedGromov:
        return FusedGromov(target, source, self.alpha, self.gradient == "half")

    def _barycenter(
        self, problem: BarycenterProblem, couplings: tuple[Coupling, ...], trace: Sequence[float]
    ) -> Barycenter:
        measure = fused_measure(problem, couplings)
        cost = sum(
            weight * self._cost(coupling, measure, source)
            for weight, coupling, source in zip(problem.model_weights, couplings, problem.measures, strict=True)
            if weight > 0
        )
        return Barycenter(measure, couplings, cost, Status.MAX_STEPS, {"objective": [*trace, cost]})

    def _cost(self, coupling: Coupling, target: NeuronMeasure, source: NeuronMeasure) -> float:
        """Returns the fused cost of one coupling; summed as differences where it is a permutation, to keep digits."""
        if coupling.index is None:
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


def _starts(problem: BarycenterProblem, counting: Sequence[int]) -> Iterator[tuple[NeuronMeasure, int | None]]:
    """Yields targets to start from, each with the source that it equals (None where it was resampled)."""
    fitting = [place for place in counting if problem.measures[place].size == problem.size]
    if fitting:
        if problem.is_assignment and len(counting) <= 2:
            # Which of two starts makes no difference to the problem, only to the search: choose by content, so that
            # the result does not depend on the order in which the sources are given.
            fitting = [max(fitting, key=lambda place: float(problem.measures[place].support.square().sum()))]
        for place in fitting:
            measure = problem.measures[place]
            yield (
                NeuronMeasure.uniform(measure.support, measure.structure, measure.signs),
                place if measure.is_uniform else None,
            )
        return
    for place in sorted(counting, key=lambda place: abs(problem.measures[place].size - problem.size)):
        yield _resampled(problem.measures[place], problem.size), None


def _resampled(measure: NeuronMeasure, size: int) -> NeuronMeasure:
    rows = torch.arange(size, device=measure.support.device) * measure.size // size
    structure = measure.structure
    if structure is not None:
        # Columns are read, so the sum over them is kept.
        structure = structure[:, rows][:, :, rows] * (measure.size / size)
    return NeuronMeasure.uniform(measure.support[rows], structure, measure.signs)


def _slack(barycenter: Barycenter) -> float:
    epsilon = torch.finfo(torch.promote_types(barycenter.measure.support.dtype, torch.float32)).eps
    measure = barycenter.measure
    moment = float(measure.support.square().sum())
    if measure.structure is not None:
        moment += float(measure.structure.square().sum())
    return 8 * epsilon * (moment / max(measure.size, 1) + barycenter.cost)
