"""Couplings that are invertible linear maps: a rotation of a residual stream, of the inner space of a head."""

# ruff: noqa: D102 - what a method does is said once, in Coupling
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mergekit_ot.transport.coupling import Coupling, have_close_plans
from mergekit_ot.transport.measure import Signs, uniform_mass
from mergekit_ot.transport.permutation import Permutation
from mergekit_ot.transport.plan import Plan

# How far the readers' map may be from the inverse transpose of the makers', by the type that it is stored in.
_TOLERANCE = {torch.float64: 1e-8}
_SINGLE_TOLERANCE = 1e-4


@final
@dataclass(frozen=True, eq=False)
class InvertibleMap(Coupling):
    """Fused neurons are linear combinations of the source's, and what reads them gets the inverse transpose.

    What a neuron makes follows `matrix`, what reads it `reader_matrix`; a source that is moved computes its function
    wherever the group allows such a map. Numbers that do not follow a neuron's direction (`is_odd` false: gains of one
    and biases of zero behind a normal form) are averaged by the squares of the (nearest orthogonal) matrix, which keeps
    constants.

    There may be more fused neurons than the source has: the columns are orthonormal then, times √(m / n), so that the
    mean square over the neurons, which norms ask for, stays what it was.

    Attributes:
        matrix: Target neuron j is ``Σ_k matrix[j, k]`` times source neuron k. Shape ``[m, n]``, with m at least n.
        reader_matrix: Its inverse transpose (of a wider one, what takes it back). Where none is given the columns are
            orthogonal and alike: it is the matrix itself times n / m.

    Example:
        >>> quarter = InvertibleMap(torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
        >>> quarter.move(torch.tensor([3.0, 4.0]), 0, reads=False, is_odd=True).tolist()
        [-4.0, 3.0]
        >>> quarter.is_exact, quarter.is_permutation
        (True, False)
        >>> wider = InvertibleMap(torch.tensor([[2**0.5], [0.0]]))
        >>> wider.move(torch.tensor([3.0]), 0, reads=False, is_odd=True).square().mean().round()
        tensor(9.)
    """

    matrix: Float[Tensor, "m n"]
    reader_matrix: Float[Tensor, "m n"] | None = None

    @property
    def target_size(self) -> int:
        return self.matrix.shape[0]

    @property
    def source_size(self) -> int:
        return self.matrix.shape[1]

    @property
    def is_wider(self) -> bool:
        """Whether there are more fused neurons than the source has."""
        return self.target_size > self.source_size

    @property
    def is_permutation(self) -> bool:
        return False

    @property
    def is_exact(self) -> bool:
        return True

    @property
    def is_identity(self) -> bool:
        return bool(torch.equal(self.matrix, torch.eye(self.target_size).to(self.matrix)))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.matrix,) if self.reader_matrix is None else (self.matrix, self.reader_matrix)

    def flaw(self) -> str:
        shape = tuple(self.matrix.shape)
        if len(shape) != 2 or shape[0] < shape[1] or not self.matrix.is_floating_point():
            return f"its matrix is a {self.matrix.dtype} of shape {shape}, not a square matrix of numbers or a higher"
        if self.reader_matrix is not None and tuple(self.reader_matrix.shape) != shape:
            return f"the map of the readers has shape {tuple(self.reader_matrix.shape)}, not {shape}"
        apart = self.linear_map(True).T @ self.linear_map(False) - torch.eye(shape[1]).to(self.matrix)
        largest = float(apart.abs().max()) if apart.numel() else 0.0
        if not largest <= _TOLERANCE.get(self.matrix.dtype, _SINGLE_TOLERANCE):
            return f"what it does to readers is not the inverse of what it does to makers (off by {largest:.2g})"
        return ""

    def to(self, like: Tensor) -> InvertibleMap:
        readers = None if self.reader_matrix is None else self.reader_matrix.to(like)
        return InvertibleMap(self.matrix.to(like), readers)

    def is_same(self, other: object, rtol: float = 0.0, atol: float = 0.0) -> bool:
        if not isinstance(other, InvertibleMap):
            return have_close_plans(self, other, rtol, atol)
        ours, theirs = self.matrix, other.matrix.to(self.matrix)
        return ours.shape == theirs.shape and bool(torch.allclose(ours, theirs, rtol=rtol, atol=atol))

    def linear_map(self, reads: bool, like: Tensor | None = None) -> Float[Tensor, "m n"]:
        chosen = self.matrix if self.reader_matrix is None or not reads else self.reader_matrix
        chosen = chosen if like is None else chosen.to(like)
        is_derived = reads and self.reader_matrix is None and self.is_wider
        return chosen * (self.source_size / self.target_size) if is_derived else chosen

    def transport_plan(self, like: Tensor | None = None) -> Float[Tensor, "m n"]:
        matrix = self.matrix if like is None else self.matrix.to(like)
        if self.reader_matrix is not None:
            # Rows and columns of squares sum to one in orthogonal matrices alone: those of the nearest one do.
            left, _, right = torch.linalg.svd(matrix, full_matrices=False)
            matrix = left @ right
        elif self.is_wider:
            matrix = matrix * (self.source_size / self.target_size) ** 0.5
        squares = matrix.square()
        if self.is_wider:
            # What is missing of a row's sum of one comes from all neurons alike, so that columns share evenly, too.
            squares = squares + (1 - squares.sum(1, keepdim=True)).clamp_min(0) / max(self.source_size, 1)
        return squares / max(self.target_size, 1)

    def signed_plan(self, like: Tensor | None = None) -> Float[Tensor, "m n"]:
        plan = self.transport_plan(like)
        return plan * torch.where(self.matrix.to(plan) < 0, -1.0, 1.0).to(plan)

    def target_marginal(self, like: Tensor | None = None) -> Float[Tensor, " m"]:
        return uniform_mass(self.target_size, self.matrix if like is None else like)

    def source_marginal(self, like: Tensor | None = None) -> Float[Tensor, " n"]:
        return uniform_mass(self.source_size, self.matrix if like is None else like)

    def presence(self, like: Tensor | None = None) -> None:
        return None

    def partners(self) -> Int[Tensor, " m"]:
        return self.transport_plan().argmax(1)

    def entries(self, reads: bool) -> Iterator[tuple[int, int, float]]:
        weights = self.split_map().T if reads else self.average_map()
        for target, source in weights.nonzero().tolist():
            yield target, source, float(weights[target, source])

    def move(self, values: Tensor, axis: int, reads: bool, is_odd: bool | Bool[Tensor, ...] = False) -> Tensor:
        if is_odd is True:
            return _along(values, axis, self.linear_map(reads, values))
        even = _along(values, axis, self.split_map(values).T if reads else self.average_map(values))
        return even if is_odd is False else torch.where(is_odd, self.move(values, axis, reads, True), even)

    def move_support(self, support: Float[Tensor, "n d"], signs: Signs | None = None) -> Float[Tensor, "m d"]:
        return self.move(support, 0, False, False if signs is None else signs.columns)

    def move_structure(self, structure: Float[Tensor, "s n n"], signs: Signs | None = None) -> Float[Tensor, "s m m"]:
        rows = self.move(structure, 1, False, False if signs is None else signs.rows[:, None, None])
        return self.move(rows, 2, True, False if signs is None else signs.readers[:, None, None])

    def times_transposed(self, matrices: Float[Tensor, "s q n"]) -> Float[Tensor, "s m q"]:
        return self.transport_plan(matrices) @ matrices.transpose(1, 2)

    def in_order(self, order: Int[Tensor, " m"]) -> InvertibleMap:
        return InvertibleMap(self.matrix[order], None if self.reader_matrix is None else self.reader_matrix[order])

    def negated(self, sign: Float[Tensor, " m"]) -> InvertibleMap:
        rows = sign.to(self.matrix)[:, None]
        return InvertibleMap(rows * self.matrix, None if self.reader_matrix is None else rows * self.reader_matrix)

    def with_signs(self, sign: Float[Tensor, "m n"]) -> Plan:
        return Plan(self.transport_plan()).with_signs(sign.to(self.matrix))

    def in_source_order(self, couplings: Sequence[Coupling]) -> tuple[Coupling, ...]:
        if self.is_wider or not all(isinstance(coupling, InvertibleMap | Permutation) for coupling in couplings):
            return tuple(couplings)
        return tuple(self._undone(coupling) for coupling in couplings)

    def _undone(self, other: Coupling) -> Coupling:
        """Returns another coupling with this one's map taken back."""
        if other is self or other.is_same(self):
            return Permutation.identity(self.source_size, self.matrix.device)
        makers, readers = (other.linear_map(reads, self.matrix) for reads in (False, True))
        is_orthogonal = self.reader_matrix is None and len(other.tensors) == 1
        moved = self.linear_map(True).T @ makers
        return InvertibleMap(moved, None if is_orthogonal else self.linear_map(False).T @ readers)


def _along(values: Tensor, axis: int, matrix: Float[Tensor, "m n"]) -> Tensor:
    """Returns values times a matrix along an axis."""
    moved = torch.tensordot(matrix.to(values.dtype), values.movedim(axis, 0), dims=1)
    return torch.movedim(moved, 0, axis)
