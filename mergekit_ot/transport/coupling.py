"""Couplings: how the neurons of the fused group correspond to those of one source."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergekit_ot.errors import SolverError


@dataclass(frozen=True)
class Coupling:
    """How the neurons of the fused group correspond to the neurons of one source.

    Stored as ``index`` (target neuron j is source neuron ``index[j]``; a permutation, uniform masses) or as
    ``plan``, a transport plan of shape ``[target, source]`` whose entries sum to one. Exactly one is given.

    Attributes:
        index: Shape ``[n]``.
        plan: Shape ``[target, source]``.
        sign: -1 where a source neuron arrives negated, 1 elsewhere, in the shape of `index` or `plan`; None where
            none does. Only numbers that a measure's `Signs` name change with it.
    """

    index: Int[Tensor, " n"] | None = None
    plan: Float[Tensor, "m n"] | None = None
    sign: Float[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        if (self.index is None) == (self.plan is None):
            raise SolverError("A Coupling takes either a permutation index or a transport plan, and not both.")
        if self.sign is not None and bool((self.sign > 0).all()):
            object.__setattr__(self, "sign", None)

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
        """Whether every neuron is coupled with the one at the same place, as it is."""
        return (
            self.index is not None
            and self.sign is None
            and bool(torch.equal(self.index, torch.arange(self.index.numel(), device=self.index.device)))
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

    def presence(self, like: Tensor | None = None) -> Float[Tensor, " m"] | None:
        """Returns 1 for fused neurons that have a partner in the source and 0 for those that have none.

        None where all have one, as in every coupling whose marginals are the masses.
        """
        if self.plan is None:
            return None
        found = self.plan.sum(1) > 0
        if bool(found.all()):
            return None
        return found.to(torch.float32) if like is None else found.to(like)

    def signed_plan(self, like: Tensor | None = None) -> Float[Tensor, "m n"]:
        """Returns the dense plan with the entries of negated neurons negative."""
        plan = self.transport_plan(like)
        if self.sign is None:
            return plan
        sign = self.sign.to(plan)
        return plan * (sign if self.index is None else sign[:, None])

    def average_map(self, like: Tensor | None = None, is_signed: bool = False) -> Float[Tensor, "m n"]:
        """Returns the barycentric projection for axes that own neurons: rows sum to one, up to signs."""
        plan = self.transport_plan(like)
        return (self.signed_plan(like) if is_signed else plan) / _nonzero(plan.sum(1, keepdim=True))

    def split_map(self, like: Tensor | None = None, is_signed: bool = False) -> Float[Tensor, "n m"]:
        """Returns the map for axes that read neurons: what a source neuron sends is shared out, rows sum to one."""
        plan = self.transport_plan(like)
        return ((self.signed_plan(like) if is_signed else plan) / _nonzero(plan.sum(0, keepdim=True))).T

    def in_order(self, order: Int[Tensor, " n"]) -> Coupling:
        """Returns the coupling with its target neurons in another order: place j holds target neuron ``order[j]``."""
        return Coupling(*(None if part is None else part[order] for part in (self.index, self.plan, self.sign)))

    def negated(self, sign: Float[Tensor, " m"]) -> Coupling:
        """Returns the coupling with target neurons negated where `sign` is -1."""
        if self.index is not None:
            return Coupling(index=self.index, sign=sign if self.sign is None else self.sign.to(sign) * sign)
        own = torch.ones_like(self.plan) if self.sign is None else self.sign  # type: ignore[arg-type]
        return Coupling(plan=self.plan, sign=own * sign.to(own)[:, None])


def _nonzero(mass: Tensor) -> Tensor:
    return torch.where(mass > 0, mass, torch.ones_like(mass))
