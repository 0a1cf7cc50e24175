"""Couplings that only reorder neurons, and negate some."""

# ruff: noqa: D102 - what a method does is said once, in Coupling
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mergekit_ot.transport.coupling import Coupling, have_close_plans, telling_sign
from mergekit_ot.transport.measure import Signs, uniform_mass


@final
@dataclass(frozen=True, eq=False)
class Permutation(Coupling):
    """Every fused neuron is one neuron of the source; masses are uniform.

    Attributes:
        index: Target neuron j is source neuron ``index[j]``. Shape ``[n]``.
        sign: -1 where the neuron arrives negated, 1 elsewhere. Shape ``[n]``; None where none does. Only numbers that
            a measure's `Signs` name change with it.

    Example:
        >>> swapped = Permutation(torch.tensor([1, 0]))
        >>> swapped.move(torch.tensor([3.0, 4.0]), 0, reads=False).tolist()
        [4.0, 3.0]
        >>> Permutation(torch.tensor([1, 0]), torch.tensor([1.0, -1.0])).signed_plan().sum(1).tolist()
        [0.5, -0.5]
    """

    index: Int[Tensor, " n"]
    sign: Float[Tensor, " n"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sign", telling_sign(self.sign))

    @classmethod
    def identity(cls, size: int, device: torch.device | str = "cpu") -> Permutation:
        """Returns the coupling of a group with itself, neuron by neuron."""
        return cls(torch.arange(size, device=device))

    @property
    def target_size(self) -> int:
        return self.index.numel()

    @property
    def source_size(self) -> int:
        return self.index.numel()

    @property
    def is_permutation(self) -> bool:
        return True

    @property
    def is_exact(self) -> bool:
        return True

    @property
    def is_identity(self) -> bool:
        return self.sign is None and self._stays

    @property
    def _stays(self) -> bool:
        return bool(torch.equal(self.index, torch.arange(self.index.numel(), device=self.index.device)))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.index,) if self.sign is None else (self.index, self.sign)

    def flaw(self) -> str:
        size = self.index.numel()
        if self.index.dim() != 1 or self.index.is_floating_point():
            return f"its index is a {self.index.dtype} of shape {tuple(self.index.shape)}, not a list of whole numbers"
        if not torch.equal(self.index.sort().values, torch.arange(size, device=self.index.device).to(self.index)):
            return (
                f"it takes a neuron twice, or one that there is not (its index has to hold 0 to {size - 1} once each)"
            )
        if self.sign is not None and not (self.sign.shape == self.index.shape and bool((self.sign.abs() == 1).all())):
            return "its signs are not 1 or -1 for each neuron"
        return ""

    def to(self, like: Tensor) -> Permutation:
        return Permutation(self.index.to(like.device), None if self.sign is None else self.sign.to(like))

    def is_same(self, other: object, rtol: float = 0.0, atol: float = 0.0) -> bool:
        if isinstance(other, Permutation) and self.sign is None and other.sign is None:
            return bool(torch.equal(self.index.cpu(), other.index.cpu()))
        return have_close_plans(self, other, rtol, atol)

    def transport_plan(self, like: Tensor | None = None) -> Float[Tensor, "n n"]:
        size, index = self.target_size, self.index
        dense = torch.zeros(size, size, dtype=torch.float32 if like is None else like.dtype, device=index.device)
        dense[torch.arange(size, device=dense.device), index] = 1.0 / max(size, 1)
        return dense if like is None else dense.to(like.device)

    def signed_plan(self, like: Tensor | None = None) -> Float[Tensor, "n n"]:
        plan = self.transport_plan(like)
        return plan if self.sign is None else plan * self.sign.to(plan)[:, None]

    def target_marginal(self, like: Tensor | None = None) -> Float[Tensor, " n"]:
        return uniform_mass(self.target_size, torch.empty(0, device=self.index.device) if like is None else like)

    def source_marginal(self, like: Tensor | None = None) -> Float[Tensor, " n"]:
        return self.target_marginal(like)

    def presence(self, like: Tensor | None = None) -> None:
        return None

    def partners(self) -> Int[Tensor, " n"]:
        return self.index

    def entries(self, reads: bool) -> Iterator[tuple[int, int, float]]:
        for target, source in enumerate(self.index.tolist()):
            yield target, source, 1.0

    def move(self, values: Tensor, axis: int, reads: bool, is_odd: bool | Bool[Tensor, ...] = False) -> Tensor:
        moved = values if self._stays else values.index_select(axis, self.index.to(values.device))
        if self.sign is None or is_odd is False:
            return moved
        shape = [1] * values.ndim
        shape[axis] = -1
        negated = moved * self.sign.to(values).reshape(shape)
        return negated if is_odd is True else torch.where(is_odd, negated, moved)

    def move_support(self, support: Float[Tensor, "n d"], signs: Signs | None = None) -> Float[Tensor, "n d"]:
        return self.move(support, 0, False, False if signs is None else signs.columns)

    def move_structure(self, structure: Float[Tensor, "s n n"], signs: Signs | None = None) -> Float[Tensor, "s n n"]:
        rows = self.move(structure, 1, False, False if signs is None else signs.rows[:, None, None])
        return self.move(rows, 2, True, False if signs is None else signs.readers[:, None, None])

    def times_transposed(self, matrices: Float[Tensor, "s q n"]) -> Float[Tensor, "s n q"]:
        return matrices[:, :, self.index].transpose(1, 2) / self.target_size

    def in_order(self, order: Int[Tensor, " n"]) -> Permutation:
        return Permutation(self.index[order], None if self.sign is None else self.sign[order])

    def negated(self, sign: Float[Tensor, " n"]) -> Permutation:
        return Permutation(self.index, sign if self.sign is None else self.sign.to(sign) * sign)

    def with_signs(self, sign: Float[Tensor, "n n"]) -> Permutation:
        rows = torch.arange(self.index.numel(), device=sign.device)
        return Permutation(self.index, sign[rows, self.index])

    def in_source_order(self, couplings: Sequence[Coupling]) -> tuple[Coupling, ...]:
        if self.is_identity:
            return tuple(couplings)
        order = torch.argsort(self.index)
        ordered = tuple(coupling.in_order(order) for coupling in couplings)
        sign = self.in_order(order).sign
        return ordered if sign is None else tuple(coupling.negated(sign) for coupling in ordered)
