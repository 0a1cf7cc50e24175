"""The fused Gromov-Wasserstein problem of one source and one target, with an asymmetric structure.

With densities ``F = structure / (column mass · sqrt(target size))`` the objective is

    J(Π) = ⟨C, Π⟩ + α Σ_jj'kk' (F_t[j,j'] − F_s[k,k'])² Π[j,k] Π[j',k']
         = ⟨C, Π⟩ + α (aᵀF_t²a + bᵀF_s²b) − 2α ⟨F_t Π F_sᵀ, Π⟩,

so for equal sizes and a permutation, with α = 1, it is the squared Frobenius difference of supports and structures
over the number of neurons. The square sums depend on the marginals alone, which is why only products are computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot import Coupling, NeuronMeasure, couple, ground_cost


@dataclass(frozen=True)
class Point:
    """A coupling with its products ``forward = Σ F_t Π F_sᵀ`` and ``backward = Σ F_tᵀ Π F_s``.

    Both are linear in the plan, so a mixture of two points needs no product.
    """

    coupling: Coupling | None
    plan: Float[Tensor, "m n"]
    forward: Float[Tensor, "m n"]
    backward: Float[Tensor, "m n"]

    def mixed(self, other: Point, step: float) -> Point:
        """Returns the point at `step` of the way to `other`."""
        if step == 1.0:
            return other
        return Point(
            None,
            torch.lerp(self.plan, other.plan, step),
            torch.lerp(self.forward, other.forward, step),
            torch.lerp(self.backward, other.backward, step),
        )


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
        self.alpha, self.is_half = alpha, is_half
        self.target_mass, self.source_mass = target.mass.to(dtype), source.mass.to(dtype)
        self.linear = ground_cost(target.support, source.support).to(dtype)
        self.target_density = _density(target, target.size, dtype)
        self.source_density = _density(source, target.size, dtype)
        # A shift common to both cancels in their difference; without it distances, all positive, lose digits.
        shift = (_mean(self.target_density, self.target_mass) + _mean(self.source_density, self.source_mass)) / 2
        self.target_density, self.source_density = self.target_density - shift, self.source_density - shift
        # Distances, the structure of groups that do not refer to themselves, need one product instead of two.
        self.is_symmetric = _is_symmetric(self.target_density) and _is_symmetric(self.source_density)
        self.constant = float(self._squares(self.target_density, self.target_mass)) + float(
            self._squares(self.source_density, self.source_mass)
        )

    @property
    def has_structure(self) -> bool:
        """Whether the structure says anything."""
        return self.alpha > 0 and self.target_density.shape[0] > 0 and self.source_density.shape[0] > 0

    @property
    def scale(self) -> float:
        """A typical entry of the gradient, to which the entropic `epsilon` is relative."""
        return float(self.linear.mean()) / 2 + self.alpha * self.constant / 2

    @property
    def slack(self) -> float:
        """Differences of the objective below this are rounding."""
        moments = float(self.linear.mean()) + self.alpha * self.constant
        return 8 * torch.finfo(self.linear.dtype).eps * moments

    def at(self, coupling: Coupling) -> Point:
        """Returns the point of a coupling; a permutation is applied by gather."""
        plan = coupling.transport_plan(self.linear)
        forward = self._product(coupling, plan, self.target_density, self.source_density)
        if self.is_symmetric or self.is_half:
            return Point(coupling, plan, forward, forward)
        transposed = (self.target_density.transpose(1, 2), self.source_density.transpose(1, 2))
        return Point(coupling, plan, forward, self._product(coupling, plan, *transposed))

    def objective(self, point: Point) -> float:
        """Returns the objective at a point."""
        structure = self.constant - 2 * float((point.forward * point.plan).sum())
        return float((self.linear * point.plan).sum()) + self.alpha * structure

    def gradient(self, point: Point) -> Float[Tensor, "m n"]:
        """Returns the gradient up to terms that the marginals fix; the half gradient where asked for."""
        if self.is_half:
            return self.linear - 2 * self.alpha * point.forward
        return self.linear - 2 * self.alpha * (point.forward + point.backward)

    def corner(self, cost: Float[Tensor, "m n"], prefer: Coupling | None = None) -> Point:
        """Returns the vertex of the transport polytope that is cheapest for a linear cost."""
        return self.at(couple(cost, self.target_mass, self.source_mass, prefer))

    def line(self, start: Point, end: Point) -> tuple[float, float]:
        """Returns slope and curvature of the objective on the way from one point to another."""
        way, change = end.plan - start.plan, end.forward - start.forward
        slope = (self.linear * way).sum() - 2 * self.alpha * ((start.forward * way).sum() + (change * start.plan).sum())
        return float(slope), float(-2 * self.alpha * (change * way).sum())

    def _product(self, coupling: Coupling, plan: Tensor, target: Tensor, source: Tensor) -> Float[Tensor, "m n"]:
        # [s, m, n]: row j of Π Fᵀ gathers the columns of F that j is coupled with
        if coupling.index is not None:
            carried = source[:, :, coupling.index].transpose(1, 2) / coupling.target_size
        else:
            carried = plan @ source.transpose(1, 2)
        return (target @ carried).sum(0)

    def _squares(self, density: Tensor, mass: Tensor) -> Tensor:
        return torch.einsum("j,sjk,k->", mass, density.square(), mass)


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
