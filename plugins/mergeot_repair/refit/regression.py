"""Ridge regression from sums over batches, pulled towards weights in force."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mergeot_repair.refit.grams import Gram, centred

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
        """Returns the inner products of inputs, and of inputs with what is left, when means are taken from them.

        They are changed: a second matrix of the size of a Gram matrix is not made.
        """
        if means is not None:
            inputs, _ = means
            centred(self.gram, (self.sums, self.sums), (inputs, inputs), self.count)
            centred(self.cross, (self.sums, self.rest), means, self.count)
        return self.gram, self.cross


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
        self._grams = [Gram(size) for _ in range(self.parts)]
        self._crosses = [torch.zeros(size, outputs, dtype=torch.float64) for _ in range(self.parts)]
        self.batches = 0

    def add(
        self,
        inputs: Float[Tensor, "samples inputs"],
        targets: Float[Tensor, "samples outputs"],
        inside: Bool[Tensor, "samples taps"] | None = None,
    ) -> None:
        """Adds a batch; `inside` as for `Gram.add`."""
        part = min(self.batches % FOLDS, self.parts - 1)
        self.batches += 1
        ones = torch.ones(len(inputs), 1, dtype=inputs.dtype, device=inputs.device)
        rows = torch.cat([inputs, ones], 1)
        self._grams[part].add(rows, inside)
        self._crosses[part] += rows.T @ targets

    def gram(self) -> Float[Tensor, "inputs inputs"]:
        """Returns the inner products of all inputs."""
        return self._whole(range(self.parts))[:-1, :-1]

    def solve(self, start: Float[Tensor, "outputs inputs"], has_shift: bool, strength: float | None = None) -> Solution:
        """Returns the weights with the least squared error that stay near `start`.

        Args:
            start: The weights in force, towards which the pull is.
            has_shift: Whether the outputs may be shifted.
            strength: Of the pull, relative to the mean square of an input; what suits the held-out batches where None.
        """
        start = start.double()
        if strength is None:
            is_choice = self.batches >= FOLDS
            strength = self._best(start, has_shift) if is_choice else STRENGTHS[len(STRENGTHS) // 2]
        whole = self._products(range(self.parts), start)
        means, rest = whole.means
        gram, cross = whole.around(whole.means if has_shift else None)
        change = _change(gram, cross, _pull(gram, whole.count, strength)).T
        weight = start + change
        shift = rest - change @ means if has_shift else torch.zeros_like(rest)
        variance = ((weight @ gram) * weight).sum(1) / whole.count
        if not has_shift:
            variance -= (weight @ means).square()
        return Solution(weight, shift, weight @ means + shift, variance.clamp_min(0), strength)

    def _whole(self, parts: Iterable[int]) -> Float[Tensor, "inputs inputs"]:
        """Returns the inner products of some parts' inputs, with their sums behind them."""
        first, *others = parts
        whole = self._grams[first].whole()
        for part in others:
            self._grams[part].added_to(whole)
        return whole

    def _products(self, parts: Sequence[int], start: Float[Tensor, "outputs inputs"]) -> _Products:
        gram, cross = self._whole(parts), torch.stack([self._crosses[part] for part in parts]).sum(0)
        inner, sums = gram[:-1, :-1], gram[-1, :-1].clone()
        return _Products(inner, cross[:-1] - inner @ start.T, sums, cross[-1] - start @ sums, float(gram[-1, -1]))

    def _best(self, start: Float[Tensor, "outputs inputs"], has_shift: bool) -> float:
        """Returns the strength of the pull with which fits to some parts suit the part best that was held out.

        Of two parts only the first is held out.
        """
        errors = [0.0] * len(STRENGTHS)
        for held_out in range(self.parts if self.parts > 2 else 1):
            fitted = [part for part in range(self.parts) if part != held_out]
            for place, error in enumerate(self._errors(fitted, held_out, start, has_shift)):
                errors[place] += error
        return STRENGTHS[min(range(len(errors)), key=errors.__getitem__)]

    def _errors(
        self, fitted: Sequence[int], held_out: int, start: Float[Tensor, "outputs inputs"], has_shift: bool
    ) -> list[float]:
        """Returns by how much the error on held-out samples is larger with each strength than with the first.

        Single precision is enough: differences of errors that are computed as such lose no digits to the errors' size.
        """
        products = self._products(fitted, start)
        means = products.means if has_shift else None
        gram, cross = products.around(means)
        pulls = [_pull(gram, products.count, strength) for strength in STRENGTHS]
        # Numbers that are too large or small for single precision.
        size, length = pulls[-1], float(cross.abs().max()) or 1.0
        gram, cross = (gram / size).float(), (cross / length).float()
        del products
        others, goals = self._products([held_out], start).around(means)
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
    """Returns the solution of a ridge regression; the matrix is the same before and after."""
    diagonal = gram.diagonal().clone()
    gram.diagonal().add_(pull)
    factor, info = torch.linalg.cholesky_ex(gram)
    if not int(info):
        change = torch.cholesky_solve(cross, factor)
    elif gram.dtype != torch.float64:
        change = _change(gram.double(), cross.double(), 0.0).to(gram.dtype)
    else:
        change = torch.linalg.lstsq(gram, cross).solution
    gram.diagonal().copy_(diagonal)
    return change
