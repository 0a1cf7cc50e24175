"""The fused Gromov-Wasserstein problem of one source and one target, with an asymmetric structure.

With densities ``F = structure / (column mass · sqrt(target size))`` the objective is

    J(Π) = ⟨C, Π⟩ + α Σ_jj'kk' (F_t[j,j'] − F_s[k,k'])² Π[j,k] Π[j',k']
         = ⟨C, Π⟩ + α (aᵀF_t²a + bᵀF_s²b) − 2α ⟨F_t Π F_sᵀ, Π⟩,

so for equal sizes and a permutation, with α = 1, it is the squared Frobenius difference of supports and structures
over the number of neurons. The square sums depend on the marginals alone, which is why only products are computed.

Where neurons may be negated, a plan has a signed twin ``S = Π⁺ − Π⁻`` beside ``Π = Π⁺ + Π⁻``: numbers that change
sign with a neuron meet ``S``, the others meet ``Π``, and the linear subproblem takes the better sign of every pair.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot import Coupling, NeuronMeasure, Plan, Signs, couple, ground_cost, independent_coupling


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
    (the plan itself where no neuron may be negated).
    """

    coupling: Coupling | None
    plan: Float[Tensor, "m n"]
    signed: Float[Tensor, "m n"]
    forward: Slope
    backward: Slope

    def as_coupling(self) -> Coupling:
        """Returns the coupling that the point is; a plan, where it lies between others."""
        return Plan(self.plan) if self.coupling is None else self.coupling

    def mixed(self, other: Point, step: float) -> Point:
        """Returns the point at `step` of the way to `other`."""
        if step == 1.0:
            return other
        plan = torch.lerp(self.plan, other.plan, step)
        signed = plan if self.signed is self.plan else torch.lerp(self.signed, other.signed, step)
        forward = _lerp(self.forward, other.forward, step)
        backward = forward if self.backward is self.forward else _lerp(self.backward, other.backward, step)
        return Point(None, plan, signed, forward, backward)


@dataclass(frozen=True)
class _Side:
    """What one of the two products is made of: per structure matrix, and whether its owners and readers change sign."""

    target: Float[Tensor, "s m m"]
    source: Float[Tensor, "s n n"]
    shares: Float[Tensor, "s n n"]
    owners: list[bool]
    readers: list[bool]


class FusedGromov:
    """The objective of one source against one target, its gradient, and the linear subproblem."""

    def __init__(self, target: NeuronMeasure, source: NeuronMeasure, alpha: float, is_half: bool) -> None:
        """Computes what all couplings share.

        Args:
            target: The fused group's measure.
            source: The source's measure.
            alpha: Weight of the structure; 1 is plain squared Frobenius matching.
            is_half: Follow only the first half of the gradient, as the authors of arXiv:2210.06671 do.
        """
        dtype = torch.promote_types(source.support.dtype, torch.float32)
        self.alpha, self.is_half, self.signs = alpha, is_half, source.signs
        self.target_mass, self.source_mass = target.mass.to(dtype), source.mass.to(dtype)
        self.linear = _linear(target, source, dtype)
        self.target_density = _density(target, target.size, dtype)
        self.source_density = _density(source, target.size, dtype)
        if self.signs is None:
            # A shift common to both cancels in their difference; without it distances, all positive, lose digits.
            shift = (_mean(self.target_density, self.target_mass) + _mean(self.source_density, self.source_mass)) / 2
            self.target_density, self.source_density = self.target_density - shift, self.source_density - shift
        # Distances, the structure of groups that do not refer to themselves, need one product instead of two.
        self.is_symmetric = (
            (self.signs is None or not bool((self.signs.rows | self.signs.readers).any()))
            and _is_symmetric(self.target_density)
            and _is_symmetric(self.source_density)
        )
        self.constant = float(self._squares(self.target_density, self.target_mass)) + float(
            self._squares(self.source_density, self.source_mass)
        )

    @property
    def has_structure(self) -> bool:
        """Whether the structure says anything."""
        return self.alpha > 0 and self.target_density.shape[0] > 0 and self.source_density.shape[0] > 0

    @property
    def has_signs(self) -> bool:
        """Whether neurons may be negated."""
        return self.signs is not None

    @property
    def scale(self) -> float:
        """A typical entry of the gradient, to which the entropic `epsilon` is relative."""
        return float(self.linear.even.mean()) / 2 + self.alpha * self.constant / 2

    @property
    def slack(self) -> float:
        """Differences of the objective below this are rounding."""
        moments = float(self.linear.even.mean()) + self.alpha * self.constant
        return 8 * torch.finfo(self.linear.even.dtype).eps * moments

    def uniform(self) -> Point:
        """Returns the independent coupling, in which both signs are as likely."""
        plan = independent_coupling(self.target_mass, self.source_mass).transport_plan()
        return self.between(plan, torch.zeros_like(plan) if self.has_signs else plan)

    def at(self, coupling: Coupling) -> Point:
        """Returns the point of a coupling; a permutation is applied by gather."""
        plan = coupling.transport_plan(self.linear.even)
        signed = coupling.signed_plan(self.linear.even) if self.has_signs else plan
        return self._point(coupling, plan, signed)

    def between(self, plan: Float[Tensor, "m n"], signed: Float[Tensor, "m n"]) -> Point:
        """Returns the point of a plan and its signed twin, which need not be those of one coupling."""
        return self._point(None, plan, signed)

    def objective(self, point: Point) -> float:
        """Returns the objective at a point."""
        structure = self.constant - 2 * _pair(point.forward, point.plan, point.signed)
        return _pair(self.linear, point.plan, point.signed) + self.alpha * structure

    def gradient(self, point: Point) -> Slope:
        """Returns the gradient up to terms that the marginals fix; the half gradient where asked for."""
        even, odd = point.forward.even, point.forward.odd
        if not self.is_half:
            even = even + point.backward.even
            odd = None if odd is None or point.backward.odd is None else odd + point.backward.odd
        if self.linear.odd is None or odd is None:
            return Slope(self.linear.even - 2 * self.alpha * even, self.linear.odd)
        return Slope(self.linear.even - 2 * self.alpha * even, self.linear.odd - 2 * self.alpha * odd)

    def pair_cost(self, point: Point) -> tuple[Float[Tensor, "m n"], Float[Tensor, "m n"] | None]:
        """Returns what each pair of neurons would cost beside the others of a coupling, and at which sign.

        The gradient with the terms that fixed marginals make constant: they matter where neurons may stay alone.
        """
        slope = self.gradient(point)
        rows, columns = (
            (density.square() @ mass + density.transpose(1, 2).square() @ mass).sum(0)
            for density, mass in ((self.target_density, self.target_mass), (self.source_density, self.source_mass))
        )
        even = slope.even + self.alpha * (rows[:, None] + columns)
        if slope.odd is None:
            return even, None
        return even - slope.odd.abs(), torch.where(slope.odd > 0, -1.0, 1.0).to(even)

    def corner(self, slope: Slope, prefer: Coupling | None = None) -> Point:
        """Returns the vertex of the transport polytope that is cheapest, each pair of neurons at its better sign."""
        if slope.odd is None:
            return self.at(couple(slope.even, self.target_mass, self.source_mass, prefer))
        coupling = couple(slope.even - slope.odd.abs(), self.target_mass, self.source_mass, prefer)
        return self.at(coupling.with_signs(torch.where(slope.odd > 0, -1.0, 1.0).to(slope.odd)))

    def line(self, start: Point, end: Point) -> tuple[float, float]:
        """Returns slope and curvature of the objective on the way from one point to another."""
        way = end.plan - start.plan
        signed_way = way if start.signed is start.plan else end.signed - start.signed
        change = _lerp(start.forward, end.forward, 1.0, is_difference=True)
        slope = _pair(self.linear, way, signed_way) - 2 * self.alpha * (
            _pair(start.forward, way, signed_way) + _pair(change, start.plan, start.signed)
        )
        return slope, -2 * self.alpha * _pair(change, way, signed_way)

    def _point(self, coupling: Coupling | None, plan: Tensor, signed: Tensor) -> Point:
        forward = self._product(coupling, plan, signed, self._forward)
        if self.is_symmetric or self.is_half:
            return Point(coupling, plan, signed, forward, forward)
        return Point(coupling, plan, signed, forward, self._product(coupling, plan, signed, self._backward))

    @functools.cached_property
    def _forward(self) -> _Side:
        return self._side(self.target_density, self.source_density.transpose(1, 2), is_forward=True)

    @functools.cached_property
    def _backward(self) -> _Side:
        return self._side(self.target_density.transpose(1, 2), self.source_density, is_forward=False)

    def _side(self, target: Tensor, source: Tensor, is_forward: bool) -> _Side:
        count = target.shape[0]
        owners, readers = [False] * count, [False] * count
        if self.signs is not None:
            owners, readers = self.signs.rows.tolist(), self.signs.readers.tolist()
        # Rows that lie together are gathered several times faster than columns.
        shares = (source / max(target.shape[1], 1)).contiguous()
        return _Side(target, source, shares, *((owners, readers) if is_forward else (readers, owners)))

    def _product(self, coupling: Coupling | None, plan: Tensor, signed: Tensor, side: _Side) -> Slope:
        """Returns ``Σ F_t Y F_sᵀ``, apart by whether the owning neuron changes sign; `Y` by whether the reading one."""
        parts: list[Tensor | None] = [None, None]
        for place, (owner, reader) in enumerate(zip(side.owners, side.readers, strict=True)):
            if coupling is not None and coupling.is_permutation:
                carried = coupling.move(side.shares[place], 0, reads=False, is_odd=reader)
            else:
                carried = (signed if reader else plan) @ side.source[place]
            product = side.target[place] @ carried
            part = parts[int(owner)]
            parts[int(owner)] = product if part is None else part.add_(product)
        even, odd = (torch.zeros_like(plan) if part is None else part for part in parts)
        return Slope(even, odd if self.has_signs else None)

    def _squares(self, density: Tensor, mass: Tensor) -> Tensor:
        return torch.einsum("j,sjk,k->", mass, density.square(), mass)


def _linear(target: NeuronMeasure, source: NeuronMeasure, dtype: torch.dtype) -> Slope:
    cost = ground_cost(target.support, source.support).to(dtype)
    signs: Signs | None = source.signs
    if signs is None:
        return Slope(cost)
    # |o_j − s o_k|² = |o_j|² + |o_k|² − 2 s ⟨o_j, o_k⟩: what the unsigned cost holds of the product is taken out.
    product = (target.support[:, signs.columns] @ source.support[:, signs.columns].T).to(dtype)
    return Slope(cost + 2 * product, -2 * product)


def _pair(slope: Slope, plan: Tensor, signed: Tensor) -> float:
    value = float((slope.even * plan).sum())
    return value if slope.odd is None else value + float((slope.odd * signed).sum())


def _lerp(one: Slope, other: Slope, step: float, is_difference: bool = False) -> Slope:
    def mix(a: Tensor, b: Tensor) -> Tensor:
        return b - a if is_difference else torch.lerp(a, b, step)

    odd = None if one.odd is None or other.odd is None else mix(one.odd, other.odd)
    return Slope(mix(one.even, other.even), odd)


def _density(measure: NeuronMeasure, target_size: int, dtype: torch.dtype) -> Float[Tensor, "s n n"]:
    if measure.structure is None:
        return torch.zeros(0, measure.size, measure.size, dtype=dtype, device=measure.support.device)
    mass = measure.mass.to(dtype)
    mass = torch.where(mass > 0, mass, torch.ones_like(mass))
    return measure.structure.to(dtype) / (mass * target_size**0.5)


def _mean(density: Float[Tensor, "s n n"], mass: Float[Tensor, " n"]) -> Float[Tensor, "s 1 1"]:
    return torch.einsum("j,sjk,k->s", mass, density, mass)[:, None, None]


def _is_symmetric(density: Tensor) -> bool:
    # A tolerance far below what could steer an assignment: distances are symmetric up to rounding only.
    size = float(density.abs().max()) if density.numel() else 0.0
    return bool(
        torch.allclose(density, density.transpose(1, 2), rtol=0, atol=64 * torch.finfo(density.dtype).eps * size)
    )
