"""Merging of neurons across and within sources: a fused neuron may stand for several neurons of one source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import cut_tree, linkage
from torch import Tensor

from mergekit_ot import (
    AbstractBarycenterSolver,
    BarycenterProblem,
    Coupling,
    NeuronMeasure,
    Permutation,
    Plan,
    Solution,
    Status,
    barycenter_cost,
    couple_rows,
    fused_measure,
    ground_cost,
)

# A neuron moves to another fused neuron where that gains more than rounding: relative to all that there is.
_GAIN = 1e-9
# Of the heaviest neuron's mass: what every neuron weighs at least.
_LEAST_SHARE = 1e-9


@dataclass(frozen=True)
class ZipSolver(AbstractBarycenterSolver):
    """Parts the neurons of all sources into as many clusters as the fused group has neurons (after arXiv:2305.03053).

    Every fused neuron is the mean of a cluster, which may hold several neurons of one source and none of another. So
    neurons that one source has twice, or that say nothing, make room for those that only one source has. ZipIt merges
    the pair of the highest correlation, again and again; here the sum of squared distances to the means is made small:
    by Ward's merges, and, from there as from a matching, by moving one neuron at a time. The better end is taken, so
    the cost is at most that of the matching.

    Attributes:
        max_steps: Passes over all neurons at most, in which each may move to another cluster.

    Example:
        Both sources have one neuron of their own, and two that do the same:

        >>> from mergekit_ot import NeuronMeasure
        >>> rows = ([[1.0, 0.0], [1.0, 0.0], [5.0, 0.0]], [[0.0, 7.0], [1.0, 0.0], [1.0, 0.0]])
        >>> measures = tuple(NeuronMeasure.uniform(torch.tensor(each)) for each in rows)
        >>> found = ZipSolver().solve(BarycenterProblem(measures, (0.5, 0.5), size=3))
        >>> found.measure.support.tolist(), found.cost
        ([[1.0, 0.0], [5.0, 0.0], [0.0, 7.0]], 0.0)
    """

    name = "zip"
    summary = "clusters of neurons of all sources, several of one source too (after ZipIt, arXiv:2305.03053)"
    measure = "activations"
    has_free_masses = True

    max_steps: Annotated[int, Ge(0), Le(1_000_000)] = 20

    def find(self, problem: BarycenterProblem) -> Solution:
        """Returns the couplings of the best clusters that were found."""
        counting = [problem.measures[place] for place in problem.counting]
        neurons = _Neurons.of(counting, [problem.model_weights[place] for place in problem.counting])
        starts = [neurons.merged(problem.size)]
        if problem.is_assignment:
            first = counting[0].support
            matched = [couple_rows(first, measure).partners() for measure in counting[1:]]
            starts.append(torch.cat([torch.arange(problem.size), *(p.cpu().argsort() for p in matched)]))
        ends = [neurons.settled(clusters, problem.size, self.max_steps) for clusters in starts]
        # A fused neuron weighs sources, the mean of a cluster its neurons. Where numbers of neurons differ, so do both,
        # and the matching may be better than what it moves to.
        ends += [neurons.settled(clusters, problem.size, 0) for clusters in starts[1:]]
        candidates = [(self._couplings(problem, clusters), status) for clusters, status in ends]
        couplings, status = min(candidates, key=lambda candidate: _cost(problem, candidate[0]))
        return Solution(couplings, status)

    def _couplings(self, problem: BarycenterProblem, clusters: Int[Tensor, " all"]) -> tuple[Coupling, ...]:
        """Returns the couplings that clusters mean; sources of no weight are coupled with the means."""
        sizes = [problem.measures[place].size for place in problem.counting]
        parts = dict(zip(problem.counting, clusters.split(sizes), strict=True))
        couplings: list[Coupling | None] = [
            _coupling(parts[place], problem.size, measure) if place in parts else None
            for place, measure in enumerate(problem.measures)
        ]
        if None in couplings:
            known = [Permutation.identity(1) if coupling is None else coupling for coupling in couplings]
            support = fused_measure(problem, known).support
            for place, measure in enumerate(problem.measures):
                couplings[place] = couplings[place] or couple_rows(support, measure)
        return tuple(coupling for coupling in couplings if coupling is not None)


@dataclass(frozen=True)
class _Neurons:
    """The neurons of all sources that count, one after the other: what they are seen by, and how much each weighs."""

    rows: Float[Tensor, "all d"]
    mass: Float[Tensor, " all"]
    first: int

    @classmethod
    def of(cls, measures: Sequence[NeuronMeasure], model_weights: Sequence[float]) -> _Neurons:
        rows = torch.cat([measure.support for measure in measures]).double().cpu()
        masses = [weight * m.mass.double().cpu() for weight, m in zip(model_weights, measures, strict=True)]
        mass = torch.cat(masses)
        # A neuron of no mass still has to go somewhere; what is left where a heavy one leaves must not round to zero.
        return cls(rows, mass.clamp_min(_LEAST_SHARE * float(mass.max())), measures[0].size)

    def merged(self, count: int) -> Int[Tensor, " all"]:
        """Returns the number of each neuron's cluster, by Ward's merges of the two that lose least."""
        total = len(self.rows)
        if count >= total or total < 2:
            return torch.arange(total)
        above = torch.triu_indices(total, total, 1)
        distances = ground_cost(self.rows, self.rows)[above[0], above[1]].clamp_min(0).sqrt()
        tree = linkage(distances.numpy(), "ward")
        # Not fcluster, which cuts equal heights together and, in older versions of SciPy, makes other numbers of them.
        return self._parted(torch.from_numpy(cut_tree(tree, count)[:, 0]).long(), count)

    def settled(self, clusters: Int[Tensor, " all"], count: int, passes: int) -> tuple[Int[Tensor, " all"], Status]:
        """Returns clusters after neurons moved, one at a time, to where the squared distances become less."""
        clusters, crowd = clusters.clone(), _Crowd.of(self, clusters, count)
        least = _GAIN * float((self.mass * self.rows.square().sum(1)).sum()) / max(len(self.rows), 1)
        is_settled = not passes
        for _ in range(passes):
            before = clusters.clone()
            for neuron, (row, own) in enumerate(zip(self.rows, self.mass.tolist(), strict=True)):
                here = int(clusters[neuron])
                if crowd.members[here] > 1:
                    clusters[neuron] = crowd.move(row, own, here, least)
            if torch.equal(before, clusters):
                is_settled = True
                break
        return self._ordered(clusters, count), Status.CONVERGED if is_settled else Status.MAX_STEPS

    def _parted(self, clusters: Int[Tensor, " all"], count: int) -> Int[Tensor, " all"]:
        """Returns clusters of which there are as many as wanted: neurons leave where there are several."""
        clusters = clusters.clone()
        for number in range(int(clusters.max()) + 1, count):
            crowd = torch.bincount(clusters, minlength=count)[clusters]
            clusters[int(torch.where(crowd > 1)[0][-1])] = number
        return clusters

    def _ordered(self, clusters: Int[Tensor, " all"], count: int) -> Int[Tensor, " all"]:
        """Returns the clusters numbered in the order of the first source; those without a neuron of it by length."""
        total = len(self.rows)
        earliest = torch.full((count,), total, dtype=torch.long)
        earliest.scatter_reduce_(0, clusters[: self.first], torch.arange(self.first), "amin")
        sums = self.rows.new_zeros(count, self.rows.shape[1]).index_add_(0, clusters, self.rows)
        by_length = torch.argsort(sums.square().sum(1), stable=True)
        order = by_length[torch.argsort(earliest[by_length], stable=True)]
        return torch.argsort(order)[clusters]


@dataclass(frozen=True)
class _Crowd:
    """What moving a neuron between clusters costs: their means, the squared lengths of these, masses and members."""

    means: Float[Tensor, "count d"]
    squares: Float[Tensor, " count"]
    mass: Float[Tensor, " count"]
    members: list[int]

    @classmethod
    def of(cls, neurons: _Neurons, clusters: Int[Tensor, " all"], count: int) -> _Crowd:
        mass = torch.zeros(count, dtype=torch.double).index_add_(0, clusters, neurons.mass)
        means = neurons.rows.new_zeros(count, neurons.rows.shape[1])
        means.index_add_(0, clusters, neurons.rows * neurons.mass[:, None])
        means /= torch.where(mass > 0, mass, torch.ones_like(mass))[:, None]
        return cls(means, means.square().sum(1), mass, torch.bincount(clusters, minlength=count).tolist())

    def move(self, row: Float[Tensor, " d"], own: float, here: int, least: float) -> int:
        """Moves a neuron from a cluster to the one that loses least by it, and returns that."""
        apart = (self.squares - 2 * (self.means @ row) + row.dot(row)).clamp_min(0)
        losses = self.mass * own / (self.mass + own) * apart
        rest = float(self.mass[here]) - own
        losses[here] = float(self.mass[here]) * own / max(rest, own * 1e-9) * float(apart[here]) - least
        there = int(losses.argmin())
        if there != here:
            self._add(here, row, -own)
            self._add(there, row, own)
        return there

    def _add(self, cluster: int, row: Float[Tensor, " d"], own: float) -> None:
        whole = float(self.mass[cluster]) + own
        self.means[cluster] += (row - self.means[cluster]) * (own / whole)
        self.squares[cluster] = self.means[cluster].dot(self.means[cluster])
        self.mass[cluster] = whole
        self.members[cluster] += 1 if own > 0 else -1


def _coupling(clusters: Int[Tensor, " n"], size: int, measure: NeuronMeasure) -> Coupling:
    """Returns the coupling of one source with the means of clusters."""
    if len(clusters) == size and len(torch.unique(clusters)) == size and measure.is_uniform:
        return Permutation(torch.argsort(clusters).to(measure.mass.device))
    plan = torch.zeros(size, len(clusters), dtype=measure.mass.dtype)
    plan[clusters, torch.arange(len(clusters))] = measure.mass.cpu()
    return Plan(plan.to(measure.mass.device))


def _cost(problem: BarycenterProblem, couplings: Sequence[Coupling]) -> float:
    return barycenter_cost(problem, couplings, fused_measure(problem, couplings).support)
