"""Matrices of inner products, summed over batches."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mergeot_repair.refit.pieces import each

# Columns of a block: fewer save little more, and make products too narrow to be fast.
_BLOCK = 128
# Where more of the products of two taps are of numbers inside the image, or there are fewer channels to a tap, all are
# computed at once.
_MOST_INSIDE, _LEAST_CHANNELS = 0.65, 128
# Of the mean square, what is given back to a diagonal until its matrix is positive definite.
_SHARES_BACK = (1e-5, 1e-4, 1e-3, 1e-2)


class Gram:
    """The inner products of the columns of samples, summed over batches in double precision.

    A batch is multiplied in its own precision. What stands below the blocks on the diagonal is neither computed nor
    held: the sum takes half the memory of its matrix. Nor is what zeros around an image make zero.

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
        self._sum: _UpperBlocks | _TapBlocks | None = None

    def add(self, rows: Float[Tensor, "samples columns"], inside: Bool[Tensor, "samples taps"] | None = None) -> None:
        """Adds a batch.

        Args:
            rows: The samples.
            inside: Which taps of a kernel do not read zeros around the image, where that is known; of all channels one
                after the other, and of what stands behind them, such as ones, it says nothing.
        """
        if self._sum is None:
            is_worth_it = inside is not None and _is_worth_it(inside, self.columns)
            taps = inside.shape[1] if inside is not None else 1
            self._sum = _TapBlocks(self.columns, taps) if is_worth_it else _UpperBlocks(self.columns)
        self._sum.add(rows, inside)

    def whole(self) -> Float[Tensor, "columns columns"]:
        """Returns the symmetric matrix."""
        return self.added_to(torch.zeros(self.columns, self.columns, dtype=torch.float64))

    def added_to(self, matrix: Float[Tensor, "columns columns"]) -> Float[Tensor, "columns columns"]:
        """Adds the symmetric matrix to another of its size, which is changed and returned."""
        if self._sum is not None:
            self._sum.add_to(matrix)
        return matrix


class _UpperBlocks:
    """Blocks of rows of a symmetric matrix, each from the diagonal on."""

    def __init__(self, columns: int) -> None:
        self.starts = range(0, columns, _BLOCK)
        heights = [min(_BLOCK, columns - start) for start in self.starts]
        self.blocks = [
            torch.zeros(height, columns - start, dtype=torch.float64)
            for start, height in zip(self.starts, heights, strict=True)
        ]

    def add(self, rows: Float[Tensor, "samples columns"], inside: Bool[Tensor, "samples taps"] | None) -> None:
        """Adds a batch."""

        def add_block(number: int) -> None:
            block, start = self.blocks[number], self.starts[number]
            block += rows[:, start : start + len(block)].T @ rows[:, start:]

        count, columns = rows.shape
        each(add_block, range(len(self.blocks)), count * columns**2 / 2)

    def add_to(self, matrix: Float[Tensor, "columns columns"]) -> None:
        """Adds the whole to a matrix."""
        for start, block in zip(self.starts, self.blocks, strict=True):
            stop = start + len(block)
            matrix[start:stop, start:] += block
            matrix[stop:, start:stop] += block[:, len(block) :].T


class _TapBlocks:
    """Blocks of a symmetric matrix, one for each two taps of a kernel: only samples count of which both are inside."""

    def __init__(self, columns: int, taps: int) -> None:
        self.taps, self.channels = taps, columns // taps
        self.size = self.channels * taps
        self.pairs = [(one, other) for one in range(taps) for other in range(one, taps)]
        shape = (self.channels, self.channels)
        self.blocks = [torch.zeros(shape, dtype=torch.float64) for _ in self.pairs]
        self.border = torch.zeros(columns - self.size, columns, dtype=torch.float64)

    def add(self, rows: Float[Tensor, "samples columns"], inside: Bool[Tensor, "samples taps"] | None) -> None:
        """Adds a batch."""
        count, columns = rows.shape
        by_tap = rows[:, : self.size].reshape(count, self.channels, self.taps).permute(2, 0, 1).contiguous()

        def add_block(number: int) -> None:
            one, other = self.pairs[number]
            of_one, of_other = by_tap[one], by_tap[other]
            if inside is not None:
                both = (inside[:, one] & inside[:, other]).nonzero()[:, 0]
                if len(both) < count:
                    of_one, of_other = of_one[both], of_other[both]
            self.blocks[number] += of_one.T @ of_other

        each(add_block, range(len(self.pairs)), count * columns**2 / 2)
        self.border += rows[:, self.size :].T @ rows

    def add_to(self, matrix: Float[Tensor, "columns columns"]) -> None:
        """Adds the whole to a matrix."""
        size, taps = self.size, self.taps
        for (one, other), block in zip(self.pairs, self.blocks, strict=True):
            matrix[one:size:taps, other:size:taps] += block
            if one != other:
                matrix[other:size:taps, one:size:taps] += block.T
        matrix[size:] += self.border
        matrix[:size, size:] += self.border[:, :size].T


def _is_worth_it(inside: Bool[Tensor, "samples taps"], columns: int) -> bool:
    """Whether so many products are of zeros that to leave them out is faster."""
    taps = inside.shape[1]
    if taps < 2 or columns // taps < _LEAST_CHANNELS:
        return False
    both = inside.sum(1).double().square().mean()
    return float(both) < _MOST_INSIDE * taps**2


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
