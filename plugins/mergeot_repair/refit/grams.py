"""Matrices of inner products, summed over batches: only the blocks on and above the diagonal are computed."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mergeot_repair.refit.pieces import each

# Columns of a block: fewer save little more, and make products too narrow to be fast.
_BLOCK = 128
# Of the mean square, what is given back to a diagonal until its matrix is positive definite.
_SHARES_BACK = (1e-5, 1e-4, 1e-3, 1e-2)


def add_gram(total: Float[Tensor, "columns columns"], rows: Float[Tensor, "samples columns"]) -> None:
    """Adds the inner products of the columns of `rows` to the upper blocks of `total`.

    Args:
        total: In double precision; what stands below its blocks on the diagonal is not read or written.
        rows: A batch, in the precision in which it is multiplied.
    """

    def add_block(start: int) -> None:
        stop = start + _BLOCK
        total[start:stop, start:] += rows[:, start:stop].T @ rows[:, start:]

    count, columns = rows.shape
    each(add_block, range(0, columns, _BLOCK), count * columns**2 / 2)


def mirrored(total: Float[Tensor, "columns columns"]) -> Float[Tensor, "columns columns"]:
    """Returns the whole symmetric matrix of which `total` holds the upper blocks."""
    whole = total.clone()
    for start in range(0, len(whole), _BLOCK):
        stop = start + _BLOCK
        whole[stop:, start:stop] = whole[start:stop, stop:].T
    return whole


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
