"""Exchanges: two neurons take each other's partners wherever that lowers the objective."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot import Coupling
from mergeot_gromov.pairwise import FusedGromov
from mergeot_gromov.points import Point


def exchange(problem: FusedGromov, start: Point, max_steps: int) -> Point:
    """Returns a permutation from which no exchange of two partners lowers the objective; the start, where none does.

    A neuron keeps its sign when it goes to another place. Many exchanges are made at once; where they spoil each
    other's gain, the best alone.

    Args:
        problem: The objective, followed by its whole gradient.
        start: The point of a permutation.
        max_steps: Steps at most.
    """
    point, value = start, problem.objective(start)
    for _ in range(max_steps):
        if point.coupling is None:
            break
        change = _changes(problem, point, point.coupling)
        for order in _orders(change, problem.slack):
            end = problem.exchanged(point, point.coupling, order)
            lower = problem.objective(end)
            if lower < value - problem.slack:
                point, value = end, lower
                break
        else:
            break
    if point is start or point.coupling is None:
        return start
    # Many small changes add up to more rounding than one product.
    end = problem.at(point.coupling)
    return end if problem.objective(end) < problem.objective(start) - problem.slack else start


def _changes(problem: FusedGromov, point: Point, coupling: Coupling) -> Float[Tensor, "n n"]:
    """Returns by how much each exchange changes the objective.

    The gradient tells what the exchange of two rows and two columns changes as if neither met the other; the four
    numbers where they meet, and which it counts as others, are put right.
    """
    slope = problem.gradient(point)
    gradient = coupling.move(slope.even, 1, reads=False)
    if slope.odd is not None:
        gradient = gradient + coupling.move(slope.odd, 1, reads=False, is_odd=True)
    linear = gradient + gradient.T
    linear = linear - (gradient.diagonal()[:, None] + gradient.diagonal())
    moved = coupling.move_structure(problem.source_density, problem.signs)
    meeting = torch.zeros_like(linear)
    for one, other in zip(problem.target_density, moved, strict=True):
        meeting += _symmetric_meeting(one, other) if problem.is_symmetric else _meeting(one, other)
    size = len(linear)
    return (linear + meeting * (2 * problem.alpha / size)) / size


def _meeting(one: Float[Tensor, "n n"], other: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Returns, for an exchange of j and k, what their rows and columns hold of ``⟨one, other⟩`` where they meet."""
    own, others = one.diagonal(), other.diagonal()
    row = (own[:, None] - one.T) * (other.T - others[:, None]) + (one - own) * (others - other)
    column = (own[:, None] - one) * (other - others[:, None]) + (one.T - own) * (others - other.T)
    block = (own[:, None] - own) * (others - others[:, None]) + (one - one.T) * (other.T - other)
    return row + column - block


def _symmetric_meeting(one: Float[Tensor, "n n"], other: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Returns the same where rows are columns."""
    own, others = one.diagonal(), other.diagonal()
    row = (own[:, None] - one) * (other - others[:, None])
    row += (one - own) * (others - other)
    return row.mul_(2).sub_((own[:, None] - own) * (others - others[:, None]))


def _orders(change: Float[Tensor, "n n"], slack: float) -> list[Tensor]:
    """Returns orders to try: all exchanges that are the best for both of their neurons, then the best alone."""
    best = change.min(1)
    places = torch.arange(len(change), device=change.device)
    gains = best.values < -slack
    if not bool(gains.any()):
        return []
    together = torch.where(gains & (best.indices[best.indices] == places), best.indices, places)
    alone = places.clone()
    first = int(best.values.argmin())
    second = int(best.indices[first])
    alone[first], alone[second] = second, first
    return [together, alone]
