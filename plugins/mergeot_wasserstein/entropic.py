"""Couplings with or without entropic regularisation, always with exact marginals."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot import Coupling, NeuronMeasure, Plan, couple, ground_cost, uniform_mass

_TOLERANCE = 1e-6
# A round is one step on logarithms, and so many scalings by products with the same kernel.
_SCALINGS = 20
_ROUNDS_PER_SCALE = 5
_FINAL_ROUNDS = 200
# So small a part of the cost regularises nothing, and exponents divided by it have no digits left.
_EXACT = 1e-12
_LARGEST, _SMALLEST = 1e30, 1e-300


def couple_measure(
    target: Float[Tensor, "m d"], source: NeuronMeasure, epsilon: float, prefer: Coupling | None = None
) -> Coupling:
    """Returns the coupling of a target support (uniform masses) with a source, exact without `epsilon`."""
    return couple_by(ground_cost(target, source.support), source, epsilon, prefer)


def couple_by(
    cost: Float[Tensor, "m n"], source: NeuronMeasure, epsilon: float, prefer: Coupling | None = None
) -> Coupling:
    """Returns the coupling of least cost with a source, the fused group's masses being uniform."""
    mass = uniform_mass(cost.shape[0], source.mass)
    if epsilon < _EXACT:
        return couple(cost, mass, source.mass, prefer)
    return Plan(sinkhorn(cost, mass, source.mass, epsilon).to(source.support.dtype))


def sinkhorn(
    cost: Float[Tensor, "m n"], target_mass: Float[Tensor, " m"], source_mass: Float[Tensor, " n"], epsilon: float
) -> Float[Tensor, "m n"]:
    """Returns the entropic transport plan; `epsilon` is relative to the mean of the cost.

    Plain scaling underflows at a useful `epsilon`, and logarithms are slow: so scaling runs for some iterations, and
    is then absorbed into potentials (arXiv:1610.06519). `epsilon` is approached from above, because starting there
    takes thousands of iterations. What marginal error is left is repaired by
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
    for scale in _scales(epsilon):
        rounds = _FINAL_ROUNDS if scale == epsilon else _ROUNDS_PER_SCALE
        for _ in range(rounds):
            row_potential = scale * (log_target - torch.logsumexp((column_potential - scaled) / scale, 1))
            exponent = (row_potential[:, None] - scaled) / scale
            column_potential = scale * (log_source - torch.logsumexp(exponent, 0))
            row_scaling, column_scaling, error = _scaled(
                ((row_potential[:, None] + column_potential - scaled) / scale).exp(), target, source
            )
            row_potential = row_potential + scale * row_scaling.log()
            column_potential = column_potential + scale * column_scaling.log()
            if error < _TOLERANCE:
                break
    plan = ((row_potential[:, None] + column_potential - scaled) / epsilon).exp()
    return round_to_marginals(plan, target, source)


def _scaled(
    kernel: Float[Tensor, "m n"], target: Float[Tensor, " m"], source: Float[Tensor, " n"]
) -> tuple[Float[Tensor, " m"], Float[Tensor, " n"], float]:
    """Returns what rows and columns of a kernel are to be multiplied by, and the error left in the column sums.

    Stops early where a factor grows so large that the kernel's digits would be lost.
    """
    rows, columns = torch.ones_like(target), torch.ones_like(source)
    error = float("inf")
    for _ in range(_SCALINGS):
        more_rows = target / (kernel @ columns).clamp_min(_SMALLEST)
        sums = kernel.T @ more_rows
        error = float((columns * sums - source).abs().sum())
        more_columns = source / sums.clamp_min(_SMALLEST)
        largest = max(float(each.max()) for each in (more_rows, more_columns))
        smallest = min(float(each.min()) for each in (more_rows, more_columns))
        if not (largest < _LARGEST and smallest > 1 / _LARGEST):
            break
        rows, columns = more_rows, more_columns
        if error < _TOLERANCE:
            break
    return rows, columns, error


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
