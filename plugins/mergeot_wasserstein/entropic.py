"""Couplings with or without entropic regularisation, always with exact marginals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot import Coupling, NeuronMeasure, Plan, couple, couple_rows, ground_cost, uniform_mass
from mergeot_wasserstein.dual import DualPoint, SemiDual

_TOLERANCE = 5e-6
# How near to the top of the dual the steps at a larger epsilon end: an error, and a part of what it was at first.
_NEAR, _NEARER = 0.03, 0.5
# Potentials of another cost are no help where they are farther off than this.
_ASTRAY = 0.02
# Above it the dual is nearly flat, and climbed at once.
_LARGEST_SCALE = 0.08
# So small a part of the cost regularises nothing, and exponents divided by it have no digits left.
_EXACT = 1e-12
_DIGITS = 32


@dataclass
class Potentials:
    """What is kept of an entropic coupling for the next one with the same source.

    Attributes:
        columns: The dual potentials of the source's neurons, in units of the cost; None before the first.
    """

    columns: Float[Tensor, " n"] | None = None


def couple_measure(
    target: Float[Tensor, "m d"],
    source: NeuronMeasure,
    epsilon: float,
    prefer: Coupling | None = None,
    potentials: Potentials | None = None,
) -> Coupling:
    """Returns the coupling of a target support (uniform masses) with a source, exact without `epsilon`."""
    return couple_by(ground_cost(target, source.support), source, epsilon, prefer, potentials)


def couple_signed(
    target: Float[Tensor, "m d"],
    source: NeuronMeasure,
    epsilon: float,
    prefer: Coupling | None = None,
    potentials: Potentials | None = None,
) -> Coupling:
    """Returns the same with each pair of neurons at the better sign, where the source's may be negated."""
    if source.signs is None:
        return couple_measure(target, source, epsilon, prefer, potentials)
    if epsilon < _EXACT:
        return couple_rows(target, source, prefer)
    columns = source.signs.columns
    product = target[:, columns] @ source.support[:, columns].T
    cost = (ground_cost(target, source.support) - 4 * (-product).clamp_min(0)).clamp_min(0)
    coupling = couple_by(cost, source, epsilon, prefer, potentials)
    return coupling.with_signs(torch.where(product < 0, -1.0, 1.0).to(product))


def couple_by(
    cost: Float[Tensor, "m n"],
    source: NeuronMeasure,
    epsilon: float,
    prefer: Coupling | None = None,
    potentials: Potentials | None = None,
) -> Coupling:
    """Returns the coupling of least cost with a source, the fused group's masses being uniform."""
    mass = uniform_mass(cost.shape[0], source.mass)
    if epsilon < _EXACT:
        return couple(cost, mass, source.mass, prefer)
    return Plan(sinkhorn(cost, mass, source.mass, epsilon, potentials).to(source.support.dtype))


def sinkhorn(
    cost: Float[Tensor, "m n"],
    target_mass: Float[Tensor, " m"],
    source_mass: Float[Tensor, " n"],
    epsilon: float,
    potentials: Potentials | None = None,
) -> Float[Tensor, "m n"]:
    """Returns the entropic transport plan; `epsilon` is relative to the mean of the cost.

    The dual is climbed by Newton steps (`SemiDual`), from a larger `epsilon` downwards where no potentials are known:
    far from its top they gain little. What marginal error is left is repaired by `round_to_marginals`, so that a
    support averaged with the plan is not rescaled.

    Args:
        cost: The ground cost.
        target_mass: Masses of the rows.
        source_mass: Masses of the columns.
        epsilon: The regularisation.
        potentials: Those of a similar cost; they become those of this one.
    """
    # A float32 exponent of size 1 / epsilon has lost the digits that the marginals need.
    working = torch.float32 if cost.device.type == "mps" else torch.float64
    mean = float(cost.mean()) if cost.numel() else 0.0
    unit = mean if mean > 0 else 1.0
    target, source = target_mass.to(working), source_mass.to(working)
    # Masses in single precision sum to one up to its rounding: no coupling has marginals of different sums.
    source = source * (target.sum() / source.sum())
    rows, columns = target > 0, source > 0
    plan = torch.zeros(cost.shape, dtype=working, device=cost.device)
    if bool(rows.any()) and bool(columns.any()):
        is_whole = bool(rows.all()) and bool(columns.all())
        scaled = (cost if is_whole else cost[rows][:, columns]).to(working, copy=True).div_(unit)
        found = _top(SemiDual(scaled, target[rows], source[columns]), epsilon, unit, potentials)
        plan = found.plan if is_whole else plan.index_put((rows.nonzero(), columns.nonzero()[:, 0]), found.plan)
    return round_to_marginals(plan, target, source)


def _top(dual: SemiDual, epsilon: float, unit: float, potentials: Potentials | None) -> DualPoint:
    """Returns the top of the dual."""
    enough = max(_TOLERANCE, _DIGITS * torch.finfo(dual.cost.dtype).eps / epsilon)
    known = None if potentials is None else potentials.columns
    point = None
    if known is not None and known.shape == dual.source.shape:
        point = dual.at(known / unit, epsilon)
    if point is None or point.error > _ASTRAY:
        columns, rows = dual.cost.mean(0), None
        for scale in _scales(epsilon)[:-1]:
            first = dual.at(columns, scale, rows)
            passed = dual.ascended(first, max(enough, min(_NEAR, _NEARER * first.error)))
            columns, rows = passed.columns, passed.rows
        point = dual.at(columns, epsilon, rows)
    point = dual.ascended(point, enough)
    if potentials is not None:
        potentials.columns = point.columns * unit
    return point


def round_to_marginals(
    plan: Float[Tensor, "m n"], target_mass: Float[Tensor, " m"], source_mass: Float[Tensor, " n"]
) -> Float[Tensor, "m n"]:
    """Returns a plan near `plan` with exactly these marginals (algorithm 2 of arXiv:1705.09634)."""
    rows = plan.sum(1)
    plan = plan * torch.where(rows > target_mass, target_mass / rows, torch.ones_like(rows))[:, None]
    columns = plan.sum(0)
    plan = plan * torch.where(columns > source_mass, source_mass / columns, torch.ones_like(columns))
    missing_rows = (target_mass - plan.sum(1)).clamp_min(0)
    missing_columns = (source_mass - plan.sum(0)).clamp_min(0)
    missing = missing_rows.sum()
    if float(missing) <= 0:
        return plan
    return plan + torch.outer(missing_rows, missing_columns) / missing


def _scales(epsilon: float) -> list[float]:
    scales = [epsilon]
    while scales[-1] < _LARGEST_SCALE:
        scales.append(scales[-1] * 2)
    return scales[::-1]
