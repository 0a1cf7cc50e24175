"""Neuron measures and couplings: what a solver is given, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergekit_ot.errors import SolverError


@dataclass(frozen=True)
class NeuronMeasure:
    """The neurons of one group in one source model, as a discrete probability measure.

    Attributes:
        support: One row per neuron: what the neuron is seen by (weights, activations …), expressed in
            coordinates that all measures of one problem share. Shape ``[n, d]``; ``d`` may be 0.
        mass: Mass of each neuron, non-negative, summing to one. Shape ``[n]``.
        structure: Matrices in which the group refers to itself, asymmetric in general. Shape ``[s, n, n]``.
    """

    support: Float[Tensor, "n d"]
    mass: Float[Tensor, " n"]
    structure: Float[Tensor, "s n n"] | None = None

    @classmethod
    def uniform(cls, support: Float[Tensor, "n d"], structure: Float[Tensor, "s n n"] | None = None) -> NeuronMeasure:
        """Returns the measure in which every neuron has the same mass."""
        return cls(support, uniform_mass(support.shape[0], support), structure)

    @property
    def size(self) -> int:
        """Number of neurons."""
        return self.support.shape[0]

    @property
    def is_uniform(self) -> bool:
        """Whether every neuron has the same mass."""
        return bool(torch.allclose(self.mass, uniform_mass(self.size, self.mass), atol=0, rtol=1e-6))


@dataclass(frozen=True)
class Coupling:
    """How the neurons of the fused group correspond to the neurons of one source.

    Stored as ``index`` (target neuron j is source neuron ``index[j]``; a permutation, uniform masses) or as
    ``plan``, a transport plan of shape ``[target, source]`` whose entries sum to one. Exactly one is given.
    """

    index: Int[Tensor, " n"] | None = None
    plan: Float[Tensor, "m n"] | None = None

    def __post_init__(self) -> None:
        if (self.index is None) == (self.plan is None):
            raise SolverError("A Coupling takes either a permutation index or a transport plan, and not both.")

    @classmethod
    def identity(cls, size: int, device: torch.device | str = "cpu") -> Coupling:
        """Returns the coupling of a group with itself, neuron by neuron."""
        return cls(index=torch.arange(size, device=device))

    @property
    def is_permutation(self) -> bool:
        """Whether the coupling is stored as a permutation (and so preserves the source's function)."""
        return self.index is not None

    @property
    def is_identity(self) -> bool:
        """Whether every neuron is coupled with the one at the same place."""
        return self.index is not None and bool(
            torch.equal(self.index, torch.arange(self.index.numel(), device=self.index.device))
        )

    @property
    def target_size(self) -> int:
        """Number of neurons on the fused side."""
        return self.index.numel() if self.plan is None else self.plan.shape[0]  # type: ignore[union-attr]

    @property
    def source_size(self) -> int:
        """Number of neurons on the source's side."""
        return self.index.numel() if self.plan is None else self.plan.shape[1]  # type: ignore[union-attr]

    def transport_plan(self, like: Tensor | None = None) -> Float[Tensor, "m n"]:
        """Returns the dense plan ``[target, source]`` in the dtype and on the device of `like`."""
        if self.plan is not None:
            return self.plan if like is None else self.plan.to(like)
        size = self.target_size
        dense = torch.zeros(size, size, dtype=torch.float32 if like is None else like.dtype, device=self.index.device)  # type: ignore[union-attr]
        dense[torch.arange(size, device=dense.device), self.index] = 1.0 / max(size, 1)
        return dense if like is None else dense.to(like.device)

    def target_marginal(self, like: Tensor | None = None) -> Float[Tensor, " m"]:
        """Returns the mass that arrives at each fused neuron."""
        return self.transport_plan(like).sum(1)

    def source_marginal(self, like: Tensor | None = None) -> Float[Tensor, " n"]:
        """Returns the mass that leaves each source neuron."""
        return self.transport_plan(like).sum(0)

    def average_map(self, like: Tensor | None = None) -> Float[Tensor, "m n"]:
        """Returns the barycentric projection for axes that own neurons: rows sum to one."""
        plan = self.transport_plan(like)
        return plan / _nonzero(plan.sum(1, keepdim=True))

    def split_map(self, like: Tensor | None = None) -> Float[Tensor, "n m"]:
        """Returns the map for axes that read neurons: what a source neuron sends is shared out, rows sum to one."""
        plan = self.transport_plan(like)
        return (plan / _nonzero(plan.sum(0, keepdim=True))).T


def uniform_mass(size: int, like: Tensor) -> Float[Tensor, " n"]:
    """Returns `size` equal masses in the dtype and on the device of `like`.

    Example:
        >>> uniform_mass(4, torch.zeros(1)).tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    return torch.full((size,), 1.0 / max(size, 1), dtype=like.dtype, device=like.device)


def _nonzero(mass: Tensor) -> Tensor:
    return torch.where(mass > 0, mass, torch.ones_like(mass))
