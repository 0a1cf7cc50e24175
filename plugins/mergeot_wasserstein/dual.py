"""The dual of an entropic coupling, climbed by Newton steps on the potentials of the columns."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

# Up to so many columns a factorisation takes less time than the products that would spare it.
_FACTORED = 96
# Beyond so few products for each column a factorisation is faster.
_COLUMNS_PER_PRODUCT = 16
# Above this error of the masses scaling gains more than a Newton step.
_FAR = 0.7
# Masses follow the exponential of potentials: where a step fails, none moves by more than this times the scale.
_LONGEST = 8.0
_MOST_STEPS, _MOST_CUTS, _MOST_DOUBLINGS, _CUT = 60, 12, 6, 0.25
# A step that leaves so much of the slope is too short.
_SHORT = 0.1
_GAIN, _ROUNDING = 1e-4, 1e-13
_ROUGH = 0.03
_LARGEST, _SMALLEST, _UNSEEN = 1e200, 1e-200, 1e-30


@dataclass(frozen=True)
class DualPoint:
    """Potentials of a coupling whose rows have their masses, and what follows from them.

    Attributes:
        scale: The regularisation, in units of the cost.
        columns: Potentials of the columns, in units of the cost.
        rows: The best potentials of the rows for these.
        kernel: The coupling, up to a factor per row.
        factors: What the rows of the kernel are to be multiplied by.
        sums: The masses that the columns have.
        value: The dual objective.
        error: By how much all masses of columns are off together.
    """

    scale: float
    columns: Float[Tensor, " n"]
    rows: Float[Tensor, " m"]
    kernel: Float[Tensor, "m n"]
    factors: Float[Tensor, " m"]
    sums: Float[Tensor, " n"]
    value: float
    error: float

    @property
    def plan(self) -> Float[Tensor, "m n"]:
        """The coupling."""
        return self.kernel * self.factors[:, None]


@dataclass
class _Factor:
    """The Cholesky factor of a matrix that was scaled to a diagonal of ones, and the roots of what it was scaled by."""

    lower: Float[Tensor, "n n"]
    roots: Float[Tensor, " n"]

    def solve(self, values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        scaled = (values * self.roots)[:, None].to(self.lower)
        return torch.cholesky_solve(scaled, self.lower)[:, 0].to(values).mul_(self.roots)


@dataclass
class SemiDual:
    """The dual objective as a function of the columns' potentials, those of the rows being the best for them.

    It is concave. Minus its second derivative is the Laplacian of a graph whose edges are what columns have in common:
    where the regularisation is small, next to nothing for most of them. Scaling takes thousands of rounds there,
    Newton steps a few.

    Attributes:
        cost: The ground cost.
        target: Masses of the rows, above zero.
        source: Masses of the columns, above zero.
    """

    cost: Float[Tensor, "m n"]
    target: Float[Tensor, " m"]
    source: Float[Tensor, " n"]
    _is_stiff: bool = field(default=False, init=False)

    def at(self, columns: Float[Tensor, " n"], scale: float, rows: Float[Tensor, " m"] | None = None) -> DualPoint:
        """Returns the point of some potentials.

        Args:
            columns: Potentials of the columns.
            scale: The regularisation.
            rows: Potentials of the rows near those that belong to them, where some are known.
        """
        near = (self.cost - columns).amin(1) if rows is None else rows
        kernel = torch.add((near / scale)[:, None], columns / scale)
        kernel.sub_(self.cost, alpha=1 / scale).exp_()
        totals = kernel.sum(1)
        low, high = (float(each) for each in torch.aminmax(totals))
        if rows is not None and not (low > _SMALLEST and high < _LARGEST):
            return self.at(columns, scale)
        factors = self.target / totals
        best = near + scale * factors.log()
        sums = kernel.T @ factors
        value = float(best @ self.target + columns @ self.source)
        return DualPoint(scale, columns, best, kernel, factors, sums, value, float((sums - self.source).abs().sum()))

    def ascended(self, point: DualPoint, tolerance: float) -> DualPoint:
        """Returns a point whose error is below a tolerance, or the last one that was reached.

        Args:
            point: Where to start.
            tolerance: The error that is good enough.
        """
        for _ in range(_MOST_STEPS):
            if point.error <= tolerance:
                break
            point = self._scaled(point) if point.error > _FAR else self._stepped(point)
        return point

    def _scaled(self, point: DualPoint) -> DualPoint:
        step = point.scale * (self.source / point.sums.clamp_min(_SMALLEST)).log()
        return self.at(point.columns + step, point.scale, point.rows)

    def _stepped(self, point: DualPoint) -> DualPoint:
        """Returns the point after a Newton step, doubled or cut where the objective asks for it."""
        missing = self.source - point.sums
        step = point.scale * self._direction(point, missing)
        slope = float(missing @ step)
        new = self.at(point.columns + step, point.scale, point.rows)
        if new.value >= point.value + _GAIN * slope - _ROUNDING:
            return self._doubled(point, new, step, slope)
        step = step.clamp(-_LONGEST * point.scale, _LONGEST * point.scale)
        slope = float(missing @ step)
        for cut in range(_MOST_CUTS):
            share = _CUT**cut
            new = self.at(point.columns + share * step, point.scale, point.rows)
            if new.value >= point.value + _GAIN * share * slope - _ROUNDING:
                return new
        return self._scaled(point)

    def _doubled(self, point: DualPoint, best: DualPoint, step: Float[Tensor, " n"], slope: float) -> DualPoint:
        """Returns the best point of a step that is doubled while it leaves much of the slope."""
        length = 1
        for _ in range(_MOST_DOUBLINGS):
            if not float((self.source - best.sums) @ step) > max(_SHORT * slope, _ROUNDING):
                break
            length *= 2
            longer = self.at(point.columns + length * step, point.scale, point.rows)
            if not longer.value >= best.value:
                break
            best = longer
        return best

    def _direction(self, point: DualPoint, missing: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Returns the Newton step in units of the scale: by conjugate gradients as long as they are fast."""
        size = len(missing)
        if size > _FACTORED and not self._is_stiff:
            found = self._conjugate(point, missing, size // _COLUMNS_PER_PRODUCT)
            if found is not None:
                return found
            self._is_stiff = True
        factor = self._factored(point, missing.dtype if size <= _FACTORED else torch.float32)
        return missing / point.sums.clamp_min(_SMALLEST) if factor is None else factor.solve(missing)

    def _conjugate(self, point: DualPoint, missing: Float[Tensor, " n"], most: int) -> Float[Tensor, " n"] | None:
        """Returns a rough Newton step by conjugate gradients; None where it takes too many products."""
        tolerance, sums = min(_ROUGH, point.error), point.sums.clamp_min(_SMALLEST)
        found, left = torch.zeros_like(missing), missing.clone()
        way = left / sums
        product = float(left @ way)
        goals = tolerance**2 * product, tolerance * point.error
        for _ in range(most):
            bent = self._curved(point, way)
            curvature = float(way @ bent)
            if not curvature > 0:
                return found
            found.add_(way, alpha=product / curvature)
            left.sub_(bent, alpha=product / curvature)
            eased = left / sums
            before, product = product, float(left @ eased)
            if product <= goals[0] and float(left.abs().sum()) <= goals[1]:
                return found
            way = eased.add_(way, alpha=product / before)
        return None

    def _curved(self, point: DualPoint, way: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Returns the product with the Laplacian: minus the second derivative, times the scale."""
        rows = (point.kernel @ way).mul_(point.factors.square() / self.target)
        return (point.sums * way).sub_(point.kernel.T @ rows)

    def _factored(self, point: DualPoint, dtype: torch.dtype) -> _Factor | None:
        """Returns the factor of the Laplacian, made regular."""
        halves = (point.kernel * (point.factors / self.target.sqrt())[:, None]).to(dtype)
        laplacian = torch.mm(halves.T, halves)
        # The sum of what is beside it keeps the digits of a small diagonal, which a difference of masses would lose.
        laplacian.fill_diagonal_(0)
        degrees = laplacian.sum(1).clamp_min_(_UNSEEN)
        roots = degrees.rsqrt()
        laplacian.mul_(roots[:, None]).mul_(roots).neg_()
        laplacian.diagonal().add_(1 + 8 * torch.finfo(dtype).eps)
        # All potentials may rise together, which changes nothing.
        level = degrees.sqrt() / degrees.sum().sqrt()
        lower, failed = torch.linalg.cholesky_ex(laplacian.addr_(level, level))
        return None if int(failed) else _Factor(lower, roots.to(point.sums))
