"""Points of the transport polytope with their products, and linear functions on it; several may stand in one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot import Coupling, Plan


@dataclass(frozen=True)
class Slope:
    """A linear function of a coupling: ``⟨even, Π⟩ + ⟨odd, S⟩``; `odd` is None where no neuron may be negated."""

    even: Float[Tensor, "m n"]
    odd: Float[Tensor, "m n"] | None = None

    def plus(self, cost: Float[Tensor, "m n"]) -> Slope:
        """Returns the function with a cost of the unsigned plan added."""
        return Slope(self.even + cost, self.odd)


@dataclass(frozen=True)
class Point:
    """A coupling with its products ``forward = Σ F_t Π F_sᵀ`` and ``backward = Σ F_tᵀ Π F_s``.

    Both are linear in the plan, so a mixture of two points needs no product. `signed` is the signed twin of the plan
    (the plan itself where no neuron may be negated). Several points may stand in one, along a first axis of all of its
    tensors; `coupling` is None then.
    """

    coupling: Coupling | None
    plan: Float[Tensor, "*points m n"]
    signed: Float[Tensor, "*points m n"]
    forward: Slope
    backward: Slope

    def as_coupling(self) -> Coupling:
        """Returns the coupling that the point is; a plan, where it lies between others."""
        return Plan(self.plan) if self.coupling is None else self.coupling

    def mixed(self, other: Point, step: float | Float[Tensor, "points 1 1"]) -> Point:
        """Returns the point at `step` of the way to `other`; of several points, each at its own step."""
        return _combined(lambda one, two: torch.lerp(one, two, step), self, other)

    def chosen(self, places: Sequence[int]) -> Point:
        """Returns some of several points."""
        return _combined(lambda each: each[list(places)], self)

    def single(self, place: int, coupling: Coupling | None) -> Point:
        """Returns one of several points, and the coupling that it is."""
        return replace(_combined(lambda each: each[place], self), coupling=coupling)

    @staticmethod
    def stacked(points: Sequence[Point]) -> Point:
        """Returns several points as one."""
        return _combined(lambda *each: torch.stack(each), *points)


def pairing(slope: Slope, plan: Tensor, signed: Tensor) -> Float[Tensor, "*points"]:
    """Returns the value of a linear function at a plan and its signed twin, in double precision on the processor."""
    value = (slope.even * plan).sum((-2, -1)).cpu().double()
    return value if slope.odd is None else value + (slope.odd * signed).sum((-2, -1)).cpu().double()


def difference(one: Slope, other: Slope) -> Slope:
    """Returns what the second function has more than the first."""
    odd = None if one.odd is None or other.odd is None else other.odd - one.odd
    return Slope(other.even - one.even, odd)


def _combined(combine: Callable[..., Tensor], *points: Point) -> Point:
    """Returns what an operation on tensors makes of points; what is shared within each of them stays so."""

    def slope(of: Sequence[Slope]) -> Slope:
        odd = [each.odd for each in of if each.odd is not None]
        return Slope(combine(*(each.even for each in of)), combine(*odd) if odd else None)

    plan = combine(*(point.plan for point in points))
    has_twin = any(point.signed is not point.plan for point in points)
    signed = combine(*(point.signed for point in points)) if has_twin else plan
    forward = slope([point.forward for point in points])
    is_same = all(point.backward is point.forward for point in points)
    backward = forward if is_same else slope([point.backward for point in points])
    return Point(None, plan, signed, forward, backward)
