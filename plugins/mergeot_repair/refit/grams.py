"""Matrices of inner products, summed over batches."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mergeot_repair.refit.pieces import each

# Columns of a block: fewer save little more, and make products too narrow to be fast.
_BLOCK = 128
# Of the mean square, what is given back to a diagonal until its matrix is positive definite.
_SHARES_BACK = (1e-5, 1e-4, 1e-3, 1e-2)


class Gram:
    """The inner products of the columns of samples, summed over batches in double precision.

    A batch is multiplied in its own precision. What stands below the blocks on the diagonal is neither computed nor
    held: the sum takes half the memory of its matrix.

    Args:
        columns: Numbers per sample.

    Example:
        >>> gram = Gram(2)
        >>> gram.add(torch.tensor([[1.0, 2.0]]))
        >>> gram.add(torch.tensor([[0.0, 1.0]]))
        >>> gram.whole().tolist()
        [[1.0, 2.0], [2.0, 5.0]]
    """

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self._starts = range(0, columns, _BLOCK)
        heights = [min(_BLOCK, columns - start) for start in self._starts]
        self._blocks = [
            torch.zeros(height, columns - start, dtype=torch.float64)
            for start, height in zip(self._starts, heights, strict=True)
        ]

    def add(self, rows: Float[Tensor, "samples columns"]) -> None:
        """Adds a batch."""

        def add_block(number: int) -> None:
            block, start = self._blocks[number], self._starts[number]
            block += rows[:, start : start + len(block)].T @ rows[:, start:]

        count, columns = rows.shape
        each(add_block, range(len(self._blocks)), count * columns**2 / 2)

    def whole(self) -> Float[Tensor, "columns columns"]:
        """Returns the symmetric matrix."""
        return self.added_to(torch.zeros(self.columns, self.columns, dtype=torch.float64))

    def added_to(self, matrix: Float[Tensor, "columns columns"]) -> Float[Tensor, "columns columns"]:
        """Adds the symmetric matrix to another of its size, which is changed and returned."""
        for start, block in zip(self._starts, self._blocks, strict=True):
            stop = start + len(block)
            matrix[start:stop, start:] += block
            matrix[stop:, start:stop] += block[:, len(block) :].T
        return matrix


def centred(
    products: Float[Tensor, "inputs outputs"],
    sums: tuple[Float[Tensor, " inputs"], Float[Tensor, " outputs"]],
    means: tuple[Float[Tensor, " inputs"], Float[Tensor, " outputs"]],
    count: float,
) -> Float[Tensor, "inputs outputs"]:
    """Returns inner products of what is left of samples when means are taken from them; they are changed in place.

    Args:
        products: Inner products of the inputs and outputs of the samples.
        sums: Of the inputs and of the outputs.
        means: What is taken from each input and from each output; not always the samples' own.
        count: Of the samples.
    """
    products.addr_(means[0], sums[1], alpha=-1)
    return products.addr_(sums[0] - count * means[0], means[1], alpha=-1)


def inverse_of(gram: Float[Tensor, "inputs inputs"]) -> Float[Tensor, "inputs inputs"]:
    """Returns the inverse of a positive definite matrix."""
    factor, info = torch.linalg.cholesky_ex(gram)
    # The inverse is symmetric, and found column by column: its transpose stands row by row.
    return torch.linalg.inv(gram) if int(info) else torch.cholesky_inverse(factor).mT.contiguous()


def positive_definite(gram: Float[Tensor, "inputs inputs"]) -> Float[Tensor, "inputs inputs"]:
    """Returns a Gram matrix whose diagonal has back what rounding took from its small eigenvalues.

    One that is positive definite stays as it is. Where inputs are nearly alike, the largest eigenvalue is as many times
    the mean square as there are inputs, and what single precision rounds away there is more than a small pull.

    Example:
        >>> mended = positive_definite(torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
        >>> bool((torch.linalg.eigvalsh(mended) > 0).all())
        True
    """
    mended, mean = gram, gram.diagonal().mean()
    for share in _SHARES_BACK:
        if not int(torch.linalg.cholesky_ex(mended).info):
            break
        mended = gram.clone()
        mended.diagonal().add_(share * mean)
    return mended
