"""Ridge regression from sums over batches, pulled towards weights in force."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mergeot_repair.refit.grams import add_gram, centred, mirrored

# Strengths of the pull that are tried, relative to the mean square of an input.
STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# One batch in so many is held out when the strength is chosen; of fewer batches none is, and the middle one is taken.
FOLDS = 4
# Inputs of a map up to which each fold is held out in turn: the fits cost little, and the choice is steadier.
_FEW_INPUTS = 300
_Means = tuple[Float[Tensor, " inputs"], Float[Tensor, " outputs"]]


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


@dataclass(frozen=True)
class _Products:
    """Inner products of some samples' inputs with themselves and with what the start leaves of their targets."""

    gram: Float[Tensor, "inputs inputs"]
    cross: Float[Tensor, "inputs outputs"]
    sums: Float[Tensor, " inputs"]
    rest: Float[Tensor, " outputs"]
    count: float

    @property
    def means(self) -> _Means:
        """The means of the inputs and of what is left of the targets."""
        return self.sums / self.count, self.rest / self.count

    def around(self, means: _Means | None) -> tuple[Float[Tensor, "inputs inputs"], Float[Tensor, "inputs outputs"]]:
        """Returns the inner products of inputs, and of inputs with what is left, when means are taken from them."""
        if means is None:
            return self.gram, self.cross
        inputs, _ = means
        gram = centred(self.gram.clone(), (self.sums, self.sums), (inputs, inputs), self.count)
        return gram, centred(self.cross.clone(), (self.sums, self.rest), means, self.count)


class Sums:
    """Inner products of inputs and targets; the samples themselves are not kept.

    The pull is chosen by what suits batches that were held out: of maps with many inputs one fold, of others each fold
    in turn. The solution is fitted to all.

    Args:
        inputs: Numbers per sample.
        outputs: Targets per sample.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        size = inputs + 1
        # The folds that are never held out may as well be one.
        self.parts = FOLDS if inputs <= _FEW_INPUTS else 2
        self.gram = torch.zeros(self.parts, size, size, dtype=torch.float64)
        self.cross = torch.zeros(self.parts, size, outputs, dtype=torch.float64)
        self.batches = 0

    def add(self, inputs: Float[Tensor, "samples inputs"], targets: Float[Tensor, "samples outputs"]) -> None:
        """Adds a batch."""
        part = min(self.batches % FOLDS, self.parts - 1)
        self.batches += 1
        ones = torch.ones(len(inputs), 1, dtype=inputs.dtype, device=inputs.device)
        rows = torch.cat([inputs, ones], 1)
        add_gram(self.gram[part], rows)
        self.cross[part] += rows.T @ targets

    def solve(self, start: Float[Tensor, "outputs inputs"], has_shift: bool, strength: float | None = None) -> Solution:
        """Returns the weights with the least squared error that stay near `start`.

        Args:
            start: The weights in force, towards which the pull is.
            has_shift: Whether the outputs may be shifted.
            strength: Of the pull, relative to the mean square of an input; what suits the held-out batches where None.
        """
        start = start.double()
        parts = [self._products(part, start) for part in range(self.parts)]
        if strength is None and self.batches < FOLDS:
            strength = STRENGTHS[len(STRENGTHS) // 2]
        elif strength is None:
            strength = _best(parts, has_shift)
        whole = _sum(parts)
        means, rest = whole.means
        gram, cross = whole.around(whole.means if has_shift else None)
        change = _change(gram, cross, _pull(gram, whole.count, strength)).T
        weight = start + change
        shift = rest - change @ means if has_shift else torch.zeros_like(rest)
        covariance = gram / whole.count if has_shift else whole.gram / whole.count - torch.outer(means, means)
        variance = ((weight @ covariance) * weight).sum(1).clamp_min(0)
        return Solution(weight, shift, weight @ means + shift, variance, strength)

    def _products(self, part: int, start: Float[Tensor, "outputs inputs"]) -> _Products:
        gram, cross = mirrored(self.gram[part]), self.cross[part]
        inner, sums = gram[:-1, :-1], gram[-1, :-1]
        return _Products(inner, cross[:-1] - inner @ start.T, sums, cross[-1] - start @ sums, float(gram[-1, -1]))


def _sum(parts: Sequence[_Products]) -> _Products:
    """Returns the products of all samples."""
    return _Products(
        torch.stack([part.gram for part in parts]).sum(0),
        torch.stack([part.cross for part in parts]).sum(0),
        torch.stack([part.sums for part in parts]).sum(0),
        torch.stack([part.rest for part in parts]).sum(0),
        sum(part.count for part in parts),
    )


def _best(parts: Sequence[_Products], has_shift: bool) -> float:
    """Returns the strength of the pull with which fits to some parts suit the part best that was held out.

    Of two parts only the first is held out.
    """
    errors = [0.0] * len(STRENGTHS)
    for number, held_out in enumerate(parts if len(parts) > 2 else parts[:1]):
        fitted = _sum([*parts[:number], *parts[number + 1 :]])
        for place, error in enumerate(_errors(fitted, held_out, has_shift)):
            errors[place] += error
    return STRENGTHS[min(range(len(errors)), key=errors.__getitem__)]


def _errors(fitted: _Products, held_out: _Products, has_shift: bool) -> list[float]:
    """Returns by how much the error on held-out samples is larger with each strength than with the first.

    Single precision is enough: differences of errors that are computed as such lose no digits to the errors' size.
    """
    means = fitted.means if has_shift else None
    gram, cross = fitted.around(means)
    pulls = [_pull(gram, fitted.count, strength) for strength in STRENGTHS]
    # Numbers that are too large or small for single precision.
    size, length = pulls[-1], float(cross.abs().max()) or 1.0
    gram, cross = (gram / size).float(), (cross / length).float()
    others, goals = held_out.around(means)
    others, goals = (others / size).float(), (goals / length).float()
    first = _change(gram, cross, pulls[0] / size)
    first_made = others @ first - 2 * goals
    errors = [0.0]
    for pull in pulls[1:]:
        change = _change(gram, cross, pull / size)
        error = ((change - first) * (others @ change + first_made)).sum(dtype=torch.float64)
        errors.append(float(error) * length**2 / size)
    return errors


def _pull(gram: Float[Tensor, "inputs inputs"], count: float, strength: float) -> float:
    return strength * float(gram.diagonal().mean()) + 1e-12 * count


def _change(
    gram: Float[Tensor, "inputs inputs"], cross: Float[Tensor, "inputs outputs"], pull: float
) -> Float[Tensor, "inputs outputs"]:
    """Returns the solution of a ridge regression."""
    pulled = gram.clone()
    pulled.diagonal().add_(pull)
    factor, info = torch.linalg.cholesky_ex(pulled)
    if not int(info):
        return torch.cholesky_solve(cross, factor)
    if gram.dtype != torch.float64:
        return _change(gram.double(), cross.double(), pull).to(gram.dtype)
    return torch.linalg.lstsq(pulled, cross).solution
