"""Free-support Wasserstein barycenter of neuron measures (arXiv:2210.06671, section on feed-forward layers)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot import (
    AbstractBarycenterSolver,
    Barycenter,
    BarycenterProblem,
    Coupling,
    NeuronMeasure,
    RecipeError,
    SolverError,
    Status,
    barycenter_cost,
    couple_apart,
    fused_measure,
    has_room,
    in_order_of,
    rounding_error,
    support_merge_cost,
    unsolved,
)
from mergeot_wasserstein.entropic import couple_measure


@dataclass(frozen=True)
class _Start:
    """A support to start from, and the source (if any) that it is a copy of."""

    support: Float[Tensor, "m d"]
    anchor: int | None = None


@dataclass(frozen=True)
class WassersteinBarycenterSolver(AbstractBarycenterSolver):
    """Alternates exact couplings with the support they imply, until the couplings repeat.

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
    """

    name: ClassVar[str] = "wb"
    summary: ClassVar[str] = "free-support Wasserstein barycenter of incoming weights (arXiv:2210.06671)"

    epsilon: float = 0.0
    max_steps: int = 100
    starts: int = 0
    keep_apart: bool = True
    max_sweeps: int = 1
    members: str = "all"
    scaling: str = "density"

    def __post_init__(self) -> None:
        if min(self.epsilon, self.starts) < 0 or min(self.max_steps, self.max_sweeps) < 1:
            raise RecipeError(
                f"Options of 'wb' are out of range: {self}. "
                "Take epsilon >= 0, starts >= 0, max_steps >= 1, max_sweeps >= 1."
            )

    def solve(self, problem: BarycenterProblem) -> Barycenter:
        """Returns the best barycenter over all starts, its neurons in the order of the first source that counts."""
        failure = unsolved(problem)
        if failure is not None:
            return failure
        if self.keep_apart and has_room(problem):
            return _kept_apart(problem)
        counting = [place for place, weight in enumerate(problem.model_weights) if weight > 0]
        starts = list(_starts(problem, counting))
        best: Barycenter | None = None
        if problem.initial is not None:
            best = _barycenter(problem, problem.initial, [], Status.CONVERGED)
            if not (problem.is_assignment and len(counting) <= 2):
                starts.insert(0, _Start(best.measure.support))
        limit = self.starts or len(starts)
        for start in starts[:limit]:
            found = self._descend(problem, start, counting)
            if best is None or found.cost < best.cost - rounding_error(problem):
                best = found
        if best is None:
            raise SolverError(
                "No source has a positive model weight, so there is nothing to fuse. Give weights that sum to one."
            )
        couplings = best.couplings
        if couplings is not problem.initial:
            couplings = in_order_of(self._complete(problem, best, counting), counting[0])
        is_same = not problem.has_structure and all(map(_is_same, couplings, best.couplings))
        measure = best.measure if is_same else fused_measure(problem, couplings)
        stats = {**best.stats, "starts": min(limit, len(starts)), "steps": len(best.stats["objective"])}  # type: ignore[arg-type]
        return replace(best, measure=measure, couplings=couplings, stats=stats)

    def _descend(self, problem: BarycenterProblem, start: _Start, counting: Sequence[int]) -> Barycenter:
        couplings = self._couple(problem, start, counting, None)
        best = _barycenter(problem, couplings, [], Status.MAX_STEPS)
        if start.anchor is not None and self._is_final(problem, counting):
            return replace(best, status=Status.CONVERGED)
        for _ in range(self.max_steps - 1):
            couplings = self._couple(problem, _Start(best.measure.support), counting, best.couplings)
            if all(_is_same(*pair) for pair in zip(couplings, best.couplings, strict=True)):
                return replace(best, status=Status.CONVERGED)
            found = _barycenter(problem, couplings, best.stats["objective"], Status.MAX_STEPS)  # type: ignore[arg-type]
            if not found.cost < best.cost - rounding_error(problem):
                return replace(best, status=Status.CONVERGED)
            best = found
        return best

    def _is_final(self, problem: BarycenterProblem, counting: Sequence[int]) -> bool:
        if not problem.is_assignment or len(counting) > 2:
            return False
        return self.epsilon == 0 or len(counting) == 1

    def _couple(
        self, problem: BarycenterProblem, start: _Start, counting: Sequence[int], current: Sequence[Coupling] | None
    ) -> tuple[Coupling, ...]:
        """Returns couplings with the sources that count; the others keep what they have, or a placeholder."""
        placeholder = Coupling.identity(problem.size, start.support.device)
        couplings = list(current) if current is not None else [placeholder] * len(problem.measures)
        for place in counting:
            measure = problem.measures[place]
            if place == start.anchor and measure.is_uniform:
                continue
            prefer = None if current is None else current[place]
            couplings[place] = couple_measure(start.support, measure, self.epsilon, prefer)
        return tuple(couplings)

    def _complete(self, problem: BarycenterProblem, best: Barycenter, counting: Sequence[int]) -> tuple[Coupling, ...]:
        """Returns the couplings with those sources coupled that have no weight, and so played no part."""
        return tuple(
            coupling if place in counting else couple_measure(best.measure.support, measure, self.epsilon)
            for place, (coupling, measure) in enumerate(zip(best.couplings, problem.measures, strict=True))
        )


def _kept_apart(problem: BarycenterProblem) -> Barycenter:
    sizes = [measure.size for measure in problem.measures]
    couplings = couple_apart(sizes, problem.size, support_merge_cost(problem))
    if problem.measures[0].support.device.type != "cpu" or problem.measures[0].support.dtype != torch.float32:
        like = problem.measures[0].support
        couplings = tuple(Coupling(plan=coupling.transport_plan(like)) for coupling in couplings)
    best = _barycenter(problem, couplings, [], Status.CONVERGED)
    if problem.initial is not None:
        in_force = _barycenter(problem, problem.initial, [], Status.CONVERGED)
        best = in_force if in_force.cost <= best.cost + rounding_error(problem) else best
    return replace(best, measure=fused_measure(problem, best.couplings))


def _barycenter(
    problem: BarycenterProblem, couplings: tuple[Coupling, ...], trace: Sequence[float], status: Status
) -> Barycenter:
    measure = fused_measure(replace(problem, measures=tuple(map(_without_structure, problem.measures))), couplings)
    cost = barycenter_cost(problem, couplings, measure.support)
    return Barycenter(measure, couplings, cost, status, {"objective": [*trace, cost]})


def _starts(problem: BarycenterProblem, counting: Sequence[int]) -> Iterator[_Start]:
    """Yields supports to start from: the sources of the right size, or else resampled ones and a random one."""
    fitting = [place for place in counting if problem.measures[place].size == problem.size]
    if fitting:
        # Two sources: the pair has one optimal coupling, from whichever end it is looked for.
        final = problem.is_assignment and len(counting) <= 2
        for place in fitting[:1] if final else fitting:
            yield _Start(problem.measures[place].support, place)
        return
    for place in sorted(counting, key=lambda place: abs(problem.measures[place].size - problem.size)):
        support = problem.measures[place].support
        yield _Start(support[torch.arange(problem.size, device=support.device) * support.shape[0] // problem.size])
    generator = torch.Generator().manual_seed(problem.seed)
    pool = torch.cat([problem.measures[place].support for place in counting])
    repeats = -(-problem.size // pool.shape[0])
    drawn = torch.cat([torch.randperm(pool.shape[0], generator=generator) for _ in range(repeats)])
    yield _Start(pool[drawn[: problem.size].to(pool.device)])


def _without_structure(measure: NeuronMeasure) -> NeuronMeasure:
    return measure if measure.structure is None else NeuronMeasure(measure.support, measure.mass)


def _is_same(first: Coupling, second: Coupling) -> bool:
    if (first.index is None) != (second.index is None):
        return False
    if first.index is not None and second.index is not None:
        return torch.equal(first.index, second.index)
    return torch.equal(first.transport_plan(), second.transport_plan())
