"""Couplings with or without entropic regularisation, always with exact marginals."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot import Coupling, NeuronMeasure, couple, ground_cost, uniform_mass

_TOLERANCE = 1e-6
_ITERATIONS_PER_SCALE = 50
_FINAL_ITERATIONS = 2000


def couple_measure(
    target: Float[Tensor, "m d"], source: NeuronMeasure, epsilon: float, prefer: Coupling | None = None
) -> Coupling:
    """Returns the coupling of a target support (uniform masses) with a source: exact where `epsilon` is 0."""
    cost = ground_cost(target, source.support)
    mass = uniform_mass(target.shape[0], source.mass)
    if epsilon == 0:
        return couple(cost, mass, source.mass, prefer)
    return Coupling(plan=sinkhorn(cost, mass, source.mass, epsilon).to(target.dtype))


def sinkhorn(
    cost: Float[Tensor, "m n"], target_mass: Float[Tensor, " m"], source_mass: Float[Tensor, " n"], epsilon: float
) -> Float[Tensor, "m n"]:
    """Returns the entropic transport plan; `epsilon` is relative to the mean of the cost.

    Works on logarithms, because plain scaling underflows at a useful `epsilon`, and approaches `epsilon` from
    above, because starting there takes thousands of iterations. What marginal error is left is repaired by
    `round_to_marginals`, so that a support averaged with the plan is not rescaled.
    """
    # A float32 logarithm of size 1 / epsilon has lost the digits that the marginals need.
    working = torch.float32 if cost.device.type == "mps" else torch.float64
    mean = float(cost.mean())
    scaled = cost.to(working) / (mean if mean > 0 else 1.0)
    target, source = target_mass.to(working), source_mass.to(working)
    log_target, log_source = target.clamp_min(1e-300).log(), source.clamp_min(1e-300).log()
    # Potentials are kept in units of the cost: they carry over from one scale to the next.
    row_potential, column_potential = torch.zeros_like(target), torch.zeros_like(source)
    scale = epsilon
    for scale in _scales(epsilon):
        iterations = _FINAL_ITERATIONS if scale == epsilon else _ITERATIONS_PER_SCALE
        for _ in range(iterations):
            row_potential = scale * (log_target - torch.logsumexp((column_potential - scaled) / scale, 1))
            exponent = (row_potential[:, None] - scaled) / scale
            updated = scale * (log_source - torch.logsumexp(exponent, 0))
            # With the rows just made right, the error left is that of the columns, at the old potential.
            error = (((column_potential - updated) / scale).exp() - 1).mul(source).abs().sum()
            column_potential = updated
            if float(error) < _TOLERANCE:
                break
    plan = ((row_potential[:, None] + column_potential - scaled) / scale).exp()
    return round_to_marginals(plan, target, source)


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
    while scales[-1] < 0.5:
        scales.append(scales[-1] * 2)
    return scales[::-1]
