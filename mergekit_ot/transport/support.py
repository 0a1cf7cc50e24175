"""Supports that are joined only when somebody asks for their rows."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor


class AbstractDeferredSupport(abc.ABC):
    """The rows of a measure, as something that can make them: solvers that look at costs alone never need them.

    Attributes:
        shape: Number of neurons and of columns.
        dtype: Of the rows.
        device: Of the rows.

    Example:
        >>> rows = ComputedSupport(lambda: torch.eye(2), like=torch.empty(0), shape=(2, 2))
        >>> rows.join().tolist(), rows.squared_norms().tolist()
        ([[1.0, 0.0], [0.0, 1.0]], [1.0, 1.0])
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @abc.abstractmethod
    def join(self) -> Float[Tensor, "n d"]:
        """Returns the rows; a tensor of its own, which the caller may keep."""

    @abc.abstractmethod
    def squared_norms(self) -> Float[Tensor, " n"]:
        """Returns the squared norm of each row."""

    @abc.abstractmethod
    def row_maxima(self) -> Float[Tensor, " n"]:
        """Returns the largest absolute value in each row; not finite where the row is not."""

    @abc.abstractmethod
    def products(self, other: AbstractDeferredSupport) -> Float[Tensor, "n m"] | None:
        """Returns the inner products of all rows with all of another support; None where only the rows tell."""


@final
class ComputedSupport(AbstractDeferredSupport):
    """Rows that follow from others by a function, such as those of a barycenter.

    Args:
        make: Returns the rows.
        like: Gives their dtype and device.
        shape: Number of neurons and of columns.

    Example:
        >>> ComputedSupport(lambda: torch.ones(2, 3), torch.empty(0), (2, 3)).row_maxima().tolist()
        [1.0, 1.0]
    """

    def __init__(self, make: Callable[[], Tensor], like: Tensor, shape: tuple[int, int]) -> None:
        self.shape, self.dtype, self.device = shape, like.dtype, like.device
        self._make = make

    def join(self) -> Float[Tensor, "n d"]:
        """Returns the rows."""
        return self._make()

    def squared_norms(self) -> Float[Tensor, " n"]:
        """Returns the squared norm of each row."""
        return torch.linalg.vector_norm(self.join(), dim=1).square()

    def row_maxima(self) -> Float[Tensor, " n"]:
        """Returns the largest absolute value in each row."""
        return self.join().abs().amax(1) if self.shape[1] else torch.zeros(self.shape[0])

    def products(self, other: AbstractDeferredSupport) -> None:
        """Returns nothing: only the rows tell."""
        return None


def weighed(tensor: Tensor) -> Tensor:
    """Returns one number: the sum of a tensor's rows, each times its place, so that an exchange of rows is seen.

    Example:
        >>> weighed(torch.tensor([[1.0], [2.0]])).item(), weighed(torch.tensor([[2.0], [1.0]])).item()
        (5.0, 4.0)
    """
    rows = tensor.detach().reshape(len(tensor), -1).sum(1, dtype=torch.float64).cpu()
    return rows @ torch.arange(1, len(rows) + 1, dtype=torch.float64)
