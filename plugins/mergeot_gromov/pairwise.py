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
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergekit_ot import Coupling, NeuronMeasure, Signs, couple, ground_cost, independent_coupling, uniform_mass
from mergeot_gromov.points import Point, Slope, difference, pairing

# Where fewer than one in so many neurons change partners, what changes of a product is less work than the product.
_FEW = 3


@dataclass(frozen=True)
class _Side:
    """What one of the two products is made of: per structure matrix, and whether its owners and readers change sign."""

    target: Float[Tensor, "s m m"]
    source: Float[Tensor, "s n n"]
    shares: Float[Tensor, "s n n"]
    owners: list[bool]
    readers: list[bool]

    def carried(self, place: int, index: Int[Tensor, "*points n"], sign: Tensor | None) -> Float[Tensor, "*points n n"]:
        """Returns what one structure of the source holds of the partners of each neuron, at their signs."""
        shares = self.shares[place]
        rows = shares.index_select(0, index.reshape(-1)).reshape(*index.shape, shares.shape[1])
        return rows if sign is None or not self.readers[place] else rows * sign


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
    def is_square(self) -> bool:
        """Whether both sides have as many neurons."""
        return self.linear.even.shape[0] == self.linear.even.shape[1]

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
        if not coupling.is_permutation:
            return self._point(coupling, plan, signed)
        sign = coupling.move(plan.new_ones(len(plan), 1), 0, reads=False, is_odd=True) if self.has_signs else None
        return self._point(coupling, plan, signed, coupling.partners(), sign)

    def exchanged(self, point: Point, coupling: Coupling, order: Int[Tensor, " n"]) -> Point:
        """Returns the point of a permutation in another order; where few neurons move, for little more than reading it.

        Args:
            point: The point of the permutation as it is.
            coupling: The permutation as it is.
            order: Where each neuron's new partner stands now.
        """
        moving = (order != torch.arange(len(order), device=order.device)).nonzero()[:, 0]
        moved = coupling.in_order(order)
        if _FEW * len(moving) > len(order):
            return self.at(moved)
        plan, signed = point.plan.clone(), point.signed
        plan[moving] = point.plan[order[moving]]
        if signed is not point.plan:
            signed = signed.clone()
            signed[moving] = point.signed[order[moving]]
        signs = coupling.signed_plan(point.plan).sum(1) * len(order) if self.has_signs else None
        ends = (coupling.partners(), signs), (moved.partners(), None if signs is None else signs[order])
        forward = self._changed(point.forward, self._forward, moving, *ends)
        one_product = point.backward is point.forward
        backward = forward if one_product else self._changed(point.backward, self._backward, moving, *ends)
        return Point(moved, plan, signed if self.has_signs else plan, forward, backward)

    def _changed(self, slope: Slope, side: _Side, moving: Tensor, *ends: tuple[Tensor, Tensor | None]) -> Slope:
        """Returns the products of a permutation of which some neurons have changed partners: before, after."""
        even, odd = slope.even, slope.odd
        for place, owner in enumerate(side.owners):
            before, after = (
                side.carried(place, index[moving], None if sign is None else sign[moving][:, None])
                for index, sign in ends
            )
            change = side.target[place][:, moving] @ (after - before)
            even, odd = (even, odd + change) if owner and odd is not None else (even + change, odd)
        return Slope(even, odd)

    def between(self, plan: Float[Tensor, "m n"], signed: Float[Tensor, "m n"]) -> Point:
        """Returns the point of a plan and its signed twin, which need not be those of one coupling."""
        return self._point(None, plan, signed)

    def objective(self, point: Point) -> float:
        """Returns the objective at a point."""
        structure = self.constant - 2 * float(pairing(point.forward, point.plan, point.signed))
        return float(pairing(self.linear, point.plan, point.signed)) + self.alpha * structure

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
            return self.at(couple(slope.even, *self._masses, prefer))
        coupling = couple(slope.even - slope.odd.abs(), *self._masses, prefer)
        return self.at(coupling.with_signs(torch.where(slope.odd > 0, -1.0, 1.0).to(slope.odd)))

    def corners(self, slope: Slope, prefer: Sequence[Coupling | None]) -> tuple[list[Coupling], Point]:
        """Returns the cheapest vertices for several linear functions, as couplings and as one point.

        Args:
            slope: The functions.
            prefer: Permutations to keep where they are optimal, as in `corner`.
        """
        costs = slope.even if slope.odd is None else slope.even - slope.odd.abs()
        couplings = [couple(cost, *self._masses, kept) for cost, kept in zip(costs, prefer, strict=True)]
        if slope.odd is not None:
            signs = torch.where(slope.odd > 0, -1.0, 1.0).to(slope.odd)
            couplings = [coupling.with_signs(sign) for coupling, sign in zip(couplings, signs, strict=True)]
        if not all(coupling.is_permutation for coupling in couplings):
            return couplings, Point.stacked([self.at(coupling) for coupling in couplings])
        index = torch.stack([coupling.partners() for coupling in couplings])
        plan = torch.zeros_like(costs).scatter_(2, index[:, :, None], 1.0 / max(index.shape[1], 1))
        if slope.odd is None:
            return couplings, self._point(None, plan, plan, index)
        sign = torch.where(slope.odd.gather(2, index[:, :, None]) > 0, -1.0, 1.0).to(slope.odd)
        return couplings, self._point(None, plan, plan * sign, index, sign)

    def line(self, start: Point, end: Point) -> tuple[Float[Tensor, "*points"], Float[Tensor, "*points"]]:
        """Returns slope and curvature of the objective on the way from one point to another, in double precision."""
        way = end.plan - start.plan
        signed_way = way if start.signed is start.plan else end.signed - start.signed
        change = difference(start.forward, end.forward)
        slope = pairing(self.linear, way, signed_way) - 2 * self.alpha * (
            pairing(start.forward, way, signed_way) + pairing(change, start.plan, start.signed)
        )
        return slope, -2 * self.alpha * pairing(change, way, signed_way)

    @functools.cached_property
    def _masses(self) -> tuple[Tensor | None, Tensor | None]:
        """The masses of both sides; None where they are uniform, so that it is found out once."""
        return _unless_uniform(self.target_mass), _unless_uniform(self.source_mass)

    def _point(
        self,
        coupling: Coupling | None,
        plan: Tensor,
        signed: Tensor,
        index: Tensor | None = None,
        sign: Tensor | None = None,
    ) -> Point:
        """Returns a point, or several; products with permutations are gathers: `index`, and `sign` as a column."""
        forward = self._product(plan, signed, self._forward, index, sign)
        if self.is_symmetric or self.is_half:
            return Point(coupling, plan, signed, forward, forward)
        return Point(coupling, plan, signed, forward, self._product(plan, signed, self._backward, index, sign))

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

    def _product(self, plan: Tensor, signed: Tensor, side: _Side, index: Tensor | None, sign: Tensor | None) -> Slope:
        """Returns ``Σ F_t Y F_sᵀ``, apart by whether the owning neuron changes sign; `Y` by whether the reading one."""
        parts: list[Tensor | None] = [None, None]
        for place, (owner, reader) in enumerate(zip(side.owners, side.readers, strict=True)):
            if index is None:
                carried = (signed if reader else plan) @ side.source[place]
            else:
                carried = side.carried(place, index, sign)
            product = side.target[place] @ carried
            part = parts[int(owner)]
            parts[int(owner)] = product if part is None else part.add_(product)
        even, odd = parts
        return Slope(_filled(even, plan), _filled(odd, plan) if self.has_signs else None)

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


def _filled(part: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if part is None else part


def _unless_uniform(mass: Float[Tensor, " n"]) -> Float[Tensor, " n"] | None:
    return None if torch.allclose(mass, uniform_mass(len(mass), mass), atol=0, rtol=1e-6) else mass


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
    if not density.numel():
        return True
    difference = float((density - density.transpose(1, 2)).abs().max())
    return difference <= 64 * torch.finfo(density.dtype).eps * float(density.abs().max())
