"""Couplings that are transport plans: neurons are blended, or have no partner."""

# ruff: noqa: D102 - what a method does is said once, in Coupling
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mergekit_ot.transport.coupling import Coupling, have_close_plans, telling_sign
from mergekit_ot.transport.measure import Signs

# Solvers in single precision leave masses this far below zero, relative to the largest.
_ROUNDING = 1e-6


@final
@dataclass(frozen=True, eq=False)
class Plan(Coupling):
    """A transport plan: fused neurons take shares of several neurons of the source.

    Attributes:
        matrix: The plan ``[target, source]``; its entries sum to one.
        sign: -1 where a pair of neurons meets negated, 1 elsewhere. Shape ``[target, source]``; None where none does.
            Only numbers that a measure's `Signs` name change with it.

    Example:
        >>> halves = Plan(torch.tensor([[0.25, 0.25, 0.0], [0.0, 0.25, 0.25]]))
        >>> halves.move(torch.tensor([2.0, 4.0, 6.0]), 0, reads=False).tolist()
        [3.0, 5.0]
        >>> halves.move(torch.tensor([2.0, 4.0, 6.0]), 0, reads=True).tolist()
        [4.0, 8.0]
    """

    matrix: Float[Tensor, "m n"]
    sign: Float[Tensor, "m n"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sign", telling_sign(self.sign))

    @property
    def target_size(self) -> int:
        return self.matrix.shape[0]

    @property
    def source_size(self) -> int:
        return self.matrix.shape[1]

    @property
    def is_permutation(self) -> bool:
        return False

    @property
    def is_exact(self) -> bool:
        return False

    @property
    def is_identity(self) -> bool:
        return False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.matrix,) if self.sign is None else (self.matrix, self.sign)

    def flaw(self) -> str:
        if self.matrix.dim() != 2 or not self.matrix.is_floating_point():
            return f"its plan is a {self.matrix.dtype} of shape {tuple(self.matrix.shape)}, not a matrix of masses"
        if self.matrix.numel() and float(self.matrix.min()) < -_ROUNDING * float(self.matrix.abs().max()):
            return f"its plan holds the negative mass {float(self.matrix.min()):.2g}"
        if self.sign is not None and not (self.sign.shape == self.matrix.shape and bool((self.sign.abs() == 1).all())):
            return "its signs are not 1 or -1 for each pair of neurons"
        return ""

    def to(self, like: Tensor) -> Plan:
        return Plan(self.matrix.to(like), None if self.sign is None else self.sign.to(like))

    def is_same(self, other: object, rtol: float = 0.0, atol: float = 0.0) -> bool:
        return have_close_plans(self, other, rtol, atol)

    def transport_plan(self, like: Tensor | None = None) -> Float[Tensor, "m n"]:
        return self.matrix if like is None else self.matrix.to(like)

    def signed_plan(self, like: Tensor | None = None) -> Float[Tensor, "m n"]:
        plan = self.transport_plan(like)
        return plan if self.sign is None else plan * self.sign.to(plan)

    def target_marginal(self, like: Tensor | None = None) -> Float[Tensor, " m"]:
        return self.transport_plan(like).sum(1)

    def source_marginal(self, like: Tensor | None = None) -> Float[Tensor, " n"]:
        return self.transport_plan(like).sum(0)

    def presence(self, like: Tensor | None = None) -> Float[Tensor, " m"] | None:
        has_partner = self.matrix.sum(1) > 0
        if bool(has_partner.all()):
            return None
        return has_partner.to(torch.float32) if like is None else has_partner.to(like)

    def partners(self) -> Int[Tensor, " m"]:
        return self.matrix.argmax(1)

    def entries(self, reads: bool) -> Iterator[tuple[int, int, float]]:
        weights = self._weights(reads)
        for target, source in weights.nonzero().tolist():
            yield target, source, float(weights[target, source])

    def move(self, values: Tensor, axis: int, reads: bool, is_odd: bool | Bool[Tensor, ...] = False) -> Tensor:
        if self.sign is None or is_odd is False:
            return self._moved(values, axis, self._weights(reads, values))
        negated = self._moved(values, axis, self._weights(reads, values, is_signed=True))
        if is_odd is True:
            return negated
        return torch.where(is_odd, negated, self._moved(values, axis, self._weights(reads, values)))

    def move_support(self, support: Float[Tensor, "n d"], signs: Signs | None = None) -> Float[Tensor, "m d"]:
        moved = self.average_map(support) @ support
        if signs is not None and self.sign is not None:
            moved[:, signs.columns] = self.average_map(support, is_signed=True) @ support[:, signs.columns]
        return moved

    def move_structure(self, structure: Float[Tensor, "s n n"], signs: Signs | None = None) -> Float[Tensor, "s m m"]:
        if signs is None or self.sign is None:
            return self.average_map(structure) @ structure @ self.split_map(structure)
        averages = [self.average_map(structure, is_signed) for is_signed in (False, True)]
        splits = [self.split_map(structure, is_signed) for is_signed in (False, True)]
        moved = [
            averages[int(row)] @ matrix @ splits[int(reader)]
            for matrix, row, reader in zip(structure, signs.rows, signs.readers, strict=True)
        ]
        return torch.stack(moved)

    def times_transposed(self, matrices: Float[Tensor, "s q n"]) -> Float[Tensor, "s m q"]:
        return self.transport_plan(matrices) @ matrices.transpose(1, 2)

    def in_order(self, order: Int[Tensor, " m"]) -> Plan:
        return Plan(self.matrix[order], None if self.sign is None else self.sign[order])

    def negated(self, sign: Float[Tensor, " m"]) -> Plan:
        own = torch.ones_like(self.matrix) if self.sign is None else self.sign
        return Plan(self.matrix, own * sign.to(own)[:, None])

    def with_signs(self, sign: Float[Tensor, "m n"]) -> Plan:
        return Plan(self.matrix, torch.where(self.matrix > 0, sign, torch.ones_like(sign)))

    def in_source_order(self, couplings: Sequence[Coupling]) -> tuple[Coupling, ...]:
        return tuple(couplings)

    def _weights(self, reads: bool, like: Tensor | None = None, is_signed: bool = False) -> Float[Tensor, "m n"]:
        return self.split_map(like, is_signed).T if reads else self.average_map(like, is_signed)

    @staticmethod
    def _moved(values: Tensor, axis: int, weights: Float[Tensor, "m n"]) -> Tensor:
        return torch.movedim(torch.tensordot(weights.to(values.dtype), values.movedim(axis, 0), dims=1), 0, axis)
