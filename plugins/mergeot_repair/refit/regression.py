"""Ridge regression from sums over batches, pulled towards weights in force."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# Strengths of the pull that are tried, relative to the mean square of an input.
STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 4


@dataclass(frozen=True)
class Solution:
    """What a regression found: weights ``[outputs, inputs]``, shifts, and the mean and variance of its outputs."""

    weight: Float[Tensor, "outputs inputs"]
    shift: Float[Tensor, " outputs"]
    mean: Float[Tensor, " outputs"]
    variance: Float[Tensor, " outputs"]
    strength: float


def joined(solutions: Sequence[Solution]) -> Solution:
    """Returns the solutions of several groups of outputs as one; its strength is the largest of theirs."""
    return Solution(
        torch.cat([solution.weight for solution in solutions]),
        torch.cat([solution.shift for solution in solutions]),
        torch.cat([solution.mean for solution in solutions]),
        torch.cat([solution.variance for solution in solutions]),
        max(solution.strength for solution in solutions),
    )


class Sums:
    """Inner products of inputs and targets in folds; the samples themselves are not kept.

    Args:
        inputs: Numbers per sample.
        outputs: Targets per sample.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        size = inputs + 1
        self.gram = torch.zeros(FOLDS, size, size, dtype=torch.float64)
        self.cross = torch.zeros(FOLDS, size, outputs, dtype=torch.float64)
        self.square = torch.zeros(FOLDS, outputs, dtype=torch.float64)
        self.batches = 0

    def add(self, inputs: Float[Tensor, "samples inputs"], targets: Float[Tensor, "samples outputs"]) -> None:
        """Adds a batch, to one fold after the other."""
        fold = self.batches % FOLDS
        self.batches += 1
        ones = torch.ones(len(inputs), 1, dtype=inputs.dtype, device=inputs.device)
        rows = torch.cat([inputs, ones], 1)
        self.gram[fold] += (rows.T @ rows).double()
        self.cross[fold] += (rows.T @ targets).double()
        self.square[fold] += targets.double().square().sum(0)

    def solve(self, start: Float[Tensor, "outputs inputs"], has_shift: bool, strength: float | None = None) -> Solution:
        """Returns the weights with the least squared error that stay near `start`.

        Args:
            start: The weights in force, towards which the pull is.
            has_shift: Whether the outputs may be shifted.
            strength: Of the pull, relative to the mean square of an input; by cross-validation where None.
        """
        gram, cross, square = self.gram.sum(0), self.cross.sum(0), self.square.sum(0)
        start = start.double()
        if strength is None:
            strength = self._best(gram, cross, square, start, has_shift)
        weight, shift = _ridge(gram, cross, start, has_shift, strength)
        count = gram[-1, -1]
        means = gram[-1, :-1] / count
        covariance = gram[:-1, :-1] / count - torch.outer(means, means)
        variance = ((weight @ covariance) * weight).sum(1).clamp_min(0)
        return Solution(weight, shift, weight @ means + shift, variance, strength)

    def _best(self, gram: Tensor, cross: Tensor, square: Tensor, start: Tensor, has_shift: bool) -> float:
        if self.batches < FOLDS:
            return STRENGTHS[len(STRENGTHS) // 2]
        errors = []
        for strength in STRENGTHS:
            error = 0.0
            for fold in range(FOLDS):
                weight, shift = _ridge(gram - self.gram[fold], cross - self.cross[fold], start, has_shift, strength)
                whole = torch.cat([weight, shift[:, None]], 1)
                predicted = ((whole @ self.gram[fold]) * whole).sum() - 2 * (whole.T * self.cross[fold]).sum()
                error += float(predicted + self.square[fold].sum())
            errors.append(error)
        return STRENGTHS[min(range(len(errors)), key=errors.__getitem__)]


def _ridge(gram: Tensor, cross: Tensor, start: Tensor, has_shift: bool, strength: float) -> tuple[Tensor, Tensor]:
    count = gram[-1, -1]
    inner, outer = gram[:-1, :-1], cross[:-1]
    means, goals = gram[-1, :-1] / count, cross[-1] / count
    if has_shift:
        inner = inner - count * torch.outer(means, means)
        outer = outer - count * torch.outer(means, goals)
    pull = strength * float(inner.diagonal().mean()) + 1e-12 * float(count)
    residual = outer - inner @ start.T
    factor, info = torch.linalg.cholesky_ex(inner + pull * torch.eye(len(inner), dtype=inner.dtype))
    if int(info):
        change = torch.linalg.lstsq(inner + pull * torch.eye(len(inner), dtype=inner.dtype), residual).solution
    else:
        change = torch.cholesky_solve(residual, factor)
    weight = start + change.T
    shift = goals - weight @ means if has_shift else torch.zeros_like(goals)
    return weight, shift
