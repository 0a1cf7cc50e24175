"""Free-support Wasserstein barycenter of neuron measures (arXiv:2210.06671, section on feed-forward layers)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le
from jaxtyping import Float
from torch import Tensor

from mergekit_ot import (
    AbstractBarycenterSolver,
    Barycenter,
    BarycenterProblem,
    Coupling,
    PairCosts,
    Permutation,
    Solution,
    Status,
    couple_apart,
    has_room,
    rounding_error,
    support_barycenter,
    support_merge_cost,
)
from mergeot_wasserstein.entropic import Potentials, couple_measure, couple_signed


@dataclass(frozen=True)
class _Start:
    """A support to start from, and the source (if any) that it is a copy of."""

    support: Float[Tensor, "m d"]
    anchor: int | None = None


@dataclass(frozen=True)
class WassersteinBarycenterSolver(AbstractBarycenterSolver):
    """Alternates exact couplings with the support they imply, until the couplings repeat.

    Three and more sources of the fused size are coupled one after the other with the mean of all others, each source in
    turn as a start: the same objective, which ends lower, on costs of pairs alone.

    With exact couplings the objective ``Σ_i λ_i ⟨Π_i, C_i(w)⟩`` never rises. Two sources of the fused group's size
    need one assignment: eliminating ``w`` leaves ``λ_1 λ_2`` times the cost of coupling them with each other.

    Attributes:
        epsilon: Entropic regularisation relative to the mean ground cost; 0 gives exact couplings.
        max_steps: Steps (couplings, then support) at most, for each start.
        starts: How many starts to try, the best is kept; 0 tries each source in turn.
        keep_apart: Whether neurons without a partner are kept apart where the fused group has room; otherwise the
            masses of all sources are spread over it.
        max_sweeps: Sweeps over the groups at most; from the second on, neurons are seen by all their weights.
        members: Which layers of a residual stream describe its neurons: ``all``, or the ``first`` (the authors').
        scaling: ``density``, or ``paper`` to compare and average weights between different widths as they are.
        signs: Whether neurons may be negated where the network allows it (not where they are kept apart).
    """

    name = "wb"
    summary = "free-support Wasserstein barycenter of incoming weights (arXiv:2210.06671)"

    epsilon: Annotated[float, Ge(0)] = 0.0
    max_steps: Annotated[int, Ge(1), Le(1_000_000)] = 100
    starts: Annotated[int, Ge(0)] = 0
    keep_apart: bool = True
    max_sweeps: Annotated[int, Ge(1), Le(1_000_000)] = 1
    members: Literal["all", "first"] = "all"
    scaling: Literal["density", "paper"] = "density"
    signs: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "uses_signs", self.signs)  # the class is frozen

    def find(self, problem: BarycenterProblem) -> Solution:
        """Returns the best couplings over all starts."""
        if self.keep_apart and has_room(problem):
            return Solution(_kept_apart(problem))
        is_plain = not self.signs or all(measure.signs is None for measure in problem.measures)
        if is_plain and self.epsilon == 0 and problem.is_assignment and len(problem.counting) > 2:
            return self._ascended(problem)
        starts = list(_starts(problem))
        if problem.initial is not None and not _is_pair(problem):
            starts.insert(0, _Start(support_barycenter(problem, problem.initial).measure.support))
        limit = self.starts or len(starts)
        descents = (self._descend(problem, start) for start in starts[:limit])
        best = next(descents)
        for descent in descents:
            if descent.cost < best.cost - rounding_error(problem):
                best = descent
        trace = best.stats["objective"]
        stats = {"objective": trace, "starts": min(limit, len(starts)), "steps": len(trace)}
        return Solution(self._complete(problem, best), best.status, stats)

    def _ascended(self, problem: BarycenterProblem) -> Solution:
        """Returns permutations of three and more sources, found on the costs of their pairs.

        A source is coupled with the mean of the others: with the barycenter itself, which it is a part of, it would
        stay where it is.
        """
        costs = PairCosts(problem)
        anchors = problem.counting[: self.starts or None]
        further = []
        if problem.initial is not None and all(coupling.is_permutation for coupling in problem.initial):
            further.append(problem.initial)
        couplings, trace = costs.ascend_from_each(anchors, further, self.max_steps - 1)
        for place in set(range(len(couplings))) - set(problem.counting):
            couplings[place] = costs.realigned(place, couplings)
        status = Status.CONVERGED if len(trace) < self.max_steps else Status.MAX_STEPS
        return Solution(tuple(couplings), status, {"objective": trace, "starts": len(anchors), "steps": len(trace)})

    def _descend(self, problem: BarycenterProblem, start: _Start) -> Barycenter:
        kept = [Potentials() for _ in problem.measures]
        best = support_barycenter(problem, self._couple(problem, start, None, kept))
        if start.anchor is not None and self._is_final(problem):
            return replace(best, status=Status.CONVERGED)
        for _ in range(self.max_steps - 1):
            couplings = self._couple(problem, _Start(best.measure.support), best.couplings, kept)
            if all(new.is_same(old) for new, old in zip(couplings, best.couplings, strict=True)):
                return replace(best, status=Status.CONVERGED)
            step = support_barycenter(problem, couplings, best.stats["objective"])
            if not step.cost < best.cost - rounding_error(problem):
                return replace(best, status=Status.CONVERGED)
            best = step
        return best

    def _is_final(self, problem: BarycenterProblem) -> bool:
        return _is_pair(problem) and (self.epsilon == 0 or len(problem.counting) == 1)

    def _couple(
        self,
        problem: BarycenterProblem,
        start: _Start,
        current: Sequence[Coupling] | None,
        kept: Sequence[Potentials],
    ) -> tuple[Coupling, ...]:
        """Returns couplings with the sources that count; the others keep what they have, or a placeholder."""
        placeholders: list[Coupling] = [Permutation.identity(problem.size, start.support.device)] * len(
            problem.measures
        )
        couplings = list(current) if current is not None else placeholders
        couple_one = couple_signed if self.signs else couple_measure
        for place in problem.counting:
            measure = problem.measures[place]
            if place == start.anchor and measure.is_uniform:
                continue
            prefer = None if current is None else current[place]
            couplings[place] = couple_one(start.support, measure, self.epsilon, prefer, kept[place])
        return tuple(couplings)

    def _complete(self, problem: BarycenterProblem, best: Barycenter) -> tuple[Coupling, ...]:
        """Returns the couplings with those sources coupled that have no weight, and so played no part."""
        couplings = list(best.couplings)
        couple_one = couple_signed if self.signs else couple_measure
        for place in set(range(len(couplings))) - set(problem.counting):
            couplings[place] = couple_one(best.measure.support, problem.measures[place], self.epsilon)
        return tuple(couplings)


def _is_pair(problem: BarycenterProblem) -> bool:
    """Whether at most two sources count, of the fused size: one assignment couples them, from whichever end."""
    return problem.is_assignment and len(problem.counting) <= 2


def _kept_apart(problem: BarycenterProblem) -> tuple[Coupling, ...]:
    sizes = [measure.size for measure in problem.measures]
    couplings = couple_apart(sizes, problem.size, support_merge_cost(problem))
    return tuple(coupling.to(problem.measures[0].support) for coupling in couplings)


def _starts(problem: BarycenterProblem) -> Iterator[_Start]:
    """Yields supports to start from: the sources of the right size, or else resampled ones and a random one."""
    fitting = [place for place in problem.counting if place in problem.fitting]
    if fitting:
        for place in fitting[:1] if _is_pair(problem) else fitting:
            yield _Start(problem.measures[place].support, place)
        return
    for place in sorted(problem.counting, key=lambda place: abs(problem.measures[place].size - problem.size)):
        support = problem.measures[place].support
        yield _Start(support[torch.arange(problem.size, device=support.device) * support.shape[0] // problem.size])
    generator = torch.Generator().manual_seed(problem.seed)
    pool = torch.cat([problem.measures[place].support for place in problem.counting])
    repeats = -(-problem.size // pool.shape[0])
    drawn = torch.cat([torch.randperm(pool.shape[0], generator=generator) for _ in range(repeats)])
    yield _Start(pool[drawn[: problem.size].to(pool.device)])
