"""Couplings into a group with room to spare: neurons without a partner are kept apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergekit_ot.transport.averaging import weight_present
from mergekit_ot.transport.barycenter import fused_measure
from mergekit_ot.transport.coupling import Coupling
from mergekit_ot.transport.ground_cost import couple, ground_cost
from mergekit_ot.transport.measure import NeuronMeasure
from mergekit_ot.transport.plan import Plan
from mergekit_ot.transport.problem import BarycenterProblem

# merge_cost(couplings of the sources placed so far, number of the next): cost [occupied, n] of putting a neuron of the
# next source where an occupied fused neuron is, and the sign (or None) at which each pair would be put together.
MergeCost = Callable[
    [Sequence[Coupling | None], int, Int[Tensor, " occupied"]],
    tuple[Float[Tensor, "occupied n"], Float[Tensor, "occupied n"] | None],
]

_ROUNDS = 20


def has_room(problem: BarycenterProblem) -> bool:
    """Whether every source fits into the fused group neuron by neuron, and at least one leaves some of it free.

    Example:
        >>> measures = tuple(NeuronMeasure.uniform(torch.zeros(size, 1)) for size in (2, 3))
        >>> [has_room(BarycenterProblem(measures, (0.5, 0.5), size)) for size in (2, 3, 4)]
        [False, True, True]
    """
    sizes = [measure.size for measure in problem.measures]
    return max(sizes) <= problem.size and min(sizes) < problem.size


def couple_apart(sizes: Sequence[int], size: int, merge_cost: MergeCost) -> tuple[Coupling, ...]:
    """Returns partial couplings: every source neuron has a fused neuron of its own, no two of one source share one.

    Sources share as few fused neurons as the size allows, and those where it costs least; with as many fused neurons
    as all sources have together, the fused model is their ensemble. One source after the other is placed by an
    assignment in which an empty fused neuron costs nothing; rounds of taking one out and placing it anew follow,
    until nothing moves. (Neurons that cost nothing together may share a fused neuron though there is room.)

    Args:
        sizes: Neurons of each source.
        size: Neurons of the fused group, at least the largest of `sizes`.
        merge_cost: Says what sharing costs.

    Example:
        >>> far = lambda placed, source, occupied: (torch.ones(len(occupied), 2), None)
        >>> [sorted(coupling.transport_plan().argmax(0).tolist()) for coupling in couple_apart([2, 2], 4, far)]
        [[0, 1], [2, 3]]
    """
    placed: list[Coupling | None] = [None] * len(sizes)
    for round_number in range(_ROUNDS):
        is_same = True
        for source, count in enumerate(sizes):
            before, placed[source] = placed[source], None
            placed[source] = found = _placed(placed, source, count, size, merge_cost)
            is_same &= before is not None and bool(torch.equal(before.signed_plan(), found.signed_plan()))
        if is_same or (round_number == 0 and len(sizes) <= 2):
            break
    return tuple(coupling for coupling in placed if coupling is not None)


def placed_measure(
    problem: BarycenterProblem, placed: Sequence[Coupling | None]
) -> tuple[NeuronMeasure, Float[Tensor, " size"]]:
    """Returns the barycenter of the sources placed so far, and the model weight that each fused neuron has from them.

    Example:
        >>> measure = NeuronMeasure.uniform(torch.tensor([[1.0]]))
        >>> problem = BarycenterProblem((measure, measure), (0.5, 0.5), size=2)
        >>> fused, weight = placed_measure(problem, [Plan(torch.tensor([[1.0], [0.0]])), None])
        >>> fused.support.tolist(), weight.tolist()
        ([[1.0], [0.0]], [0.5, 0.0])
    """
    held = [(m, w, c) for m, w, c in zip(problem.measures, problem.model_weights, placed, strict=True) if c is not None]
    weights = tuple(weight for _, weight, _ in held)
    if sum(weights) == 0:
        weights = tuple(1.0 for _ in held)
    shares = tuple(weight / sum(weights) for weight in weights)
    part = replace(problem, measures=tuple(measure for measure, _, _ in held), model_weights=shares, initial=None)
    fused = fused_measure(part, [coupling for _, _, coupling in held])
    like = fused.support.new_zeros(problem.size)
    shares = ((weight, coupling.presence(like)) for weight, (_, _, coupling) in zip(weights, held, strict=True))
    return fused, weight_present(shares, like)


def support_merge_cost(problem: BarycenterProblem) -> MergeCost:
    """Returns what sharing a fused neuron costs by the supports alone: the rise of ``Σ_i λ_i |w - V_i|²``.

    Example:
        >>> measures = tuple(NeuronMeasure.uniform(torch.tensor(rows)) for rows in ([[0.0], [2.0]], [[4.0], [0.0]]))
        >>> cost = support_merge_cost(BarycenterProblem(measures, (0.5, 0.5), size=3))
        >>> first = Plan(torch.tensor([[0.5, 0.0], [0.0, 0.5], [0.0, 0.0]]))
        >>> cost([first, None], 1, torch.tensor([0, 1]))[0].tolist()
        [[4.0, 0.0], [1.0, 1.0]]
    """

    def cost(
        placed: Sequence[Coupling | None], source: int, occupied: Int[Tensor, " occupied"]
    ) -> tuple[Tensor, Tensor | None]:
        fused, total = placed_measure(problem, placed)
        found = ground_cost(fused.support[occupied], problem.measures[source].support)
        own = problem.model_weights[source]
        # A source of no weight has no part in the objective, and still goes where it fits best.
        factor = own * total[occupied] / (own + total[occupied]) if own > 0 else torch.ones_like(total[occupied])
        return found * factor[:, None], None

    return cost


def _placed(placed: Sequence[Coupling | None], source: int, count: int, size: int, merge_cost: MergeCost) -> Coupling:
    taken = torch.zeros(size, dtype=torch.bool)
    for coupling in placed:
        if coupling is not None:
            taken |= coupling.signed_plan().abs().sum(1).cpu() > 0
    occupied = taken.nonzero()[:, 0]
    cost, sign = torch.zeros(size, size), torch.ones(size, count)
    if len(occupied):
        shared, signs = merge_cost(placed, source, occupied)
        # At least zero, so that an empty place is never worse: the fewest pairs come together.
        shared = shared.cpu() - min(float(shared.min()), 0.0)
        cost = cost.to(shared.dtype)
        cost[occupied, :count] = shared
        if signs is not None:
            sign = sign.to(shared.dtype)
            sign[occupied] = signs.cpu()
    found = couple(cost)
    targets = torch.argsort(found.partners())[:count]
    columns = torch.arange(count)
    plan = torch.zeros(size, count, dtype=cost.dtype)
    plan[targets, columns] = 1.0 / count
    return Plan(plan).with_signs(sign.to(plan))
