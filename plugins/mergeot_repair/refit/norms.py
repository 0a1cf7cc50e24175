"""Linear maps together with the BatchNorm behind them: one regression fits both."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from mergeot_repair.programs.maps import LinearMap, Norm
from mergeot_repair.refit.regression import Solution
from mergeot_repair.refit.samples import rows_of


def norm_numbers(norm: Norm, solution: Solution) -> dict[str, Tensor]:
    """Returns a BatchNorm's numbers for a regression that was fitted through it.

    It keeps the statistics of what it reads, so that training can go on from here.
    """
    written = {norm.variance: solution.variance, norm.mean: solution.mean - solution.shift}
    if norm.scale is not None:
        written[norm.scale] = (solution.variance + norm.epsilon).sqrt()
    else:
        written[norm.variance] = torch.full_like(solution.variance, 1 - norm.epsilon)
    if norm.shift is not None:
        written[norm.shift] = solution.mean
    else:
        written[norm.mean] = torch.zeros_like(solution.mean)
    return written


def combined_rows(linear_map: LinearMap, state: Mapping[str, Tensor]) -> Float[Tensor, "outputs inputs"]:
    """Returns the rows of a map together with the BatchNorm behind it."""
    rows = rows_of(linear_map, state[linear_map.weight])
    norm = linear_map.norm
    if norm is None:
        return rows
    factor = (state[norm.variance] + norm.epsilon).rsqrt()
    return rows * (factor if norm.scale is None else state[norm.scale] * factor)[:, None]
