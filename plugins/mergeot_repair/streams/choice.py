"""Chooses heads and neurons among those of all sources, and the values that the chosen heads mix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergeot_repair.refit.grams import positive_definite
from mergeot_repair.refit.pruning import Products, Regression, eliminate

# Pull of the regressions on what units hold, relative to the mean square of an input, and where only values are left.
PULL, _PULL_OF_VALUES = 1e-3, 1e-5
# Rounds over the heads; more change the error by less than a thousandth.
_ROUNDS = 4


def chosen_units(
    products: Products, root: Float[Tensor, "fused fused"], counts: Sequence[int], most: int
) -> Int[Tensor, " unit"]:
    """Returns the units that a fused network keeps, of those of all sources one after the other.

    Args:
        products: Of what the units hold, each as many numbers, and what the writer is to make.
        root: Root of the metric of what is made.
        counts: How many units each source has.
        most: How many are kept.
    """
    total = sum(counts)
    if total <= most:
        return torch.arange(total)
    regression = Regression(products, root, torch.arange(total))
    places = {"units": list(torch.arange(total).split(list(counts)))}
    return eliminate([regression], places, {"units": most})["units"].sort().values


def writer_of_neurons(products: Products, units: Int[Tensor, " unit"], outputs: int) -> Float[Tensor, "outputs unit"]:
    """Returns what the writer makes of chosen neurons."""
    gram, cross, _ = products.towards(torch.eye(outputs))
    return torch.linalg.solve(gram[units][:, units], cross[units]).T


class Values:
    """The values of chosen heads, by reduced-rank regression (Izenman 1975), head after head.

    Args:
        products: Of what each head's attention mixes, a stretch of numbers per head and query, and what is to be made.
        root: Root of the metric of what is made.
        heads: The chosen heads, of so many.
        count: How many heads there are.
        queries: How many queries share a head's values.
    """

    def __init__(
        self,
        products: Products,
        root: Float[Tensor, "fused fused"],
        heads: Int[Tensor, " head"],
        count: int,
        queries: int,
    ) -> None:
        # What was chosen holds no copies, and a pull would take from what its patterns mix least of.
        gram, cross, _ = products.towards(root, _PULL_OF_VALUES)
        self.taps = len(gram) // count
        columns = (heads[:, None] * self.taps + torch.arange(self.taps)).flatten()
        self.gram, self.cross = positive_definite(gram[columns][:, columns]), cross[columns]
        self.goals = products.towards(torch.eye(len(root)))[1][columns]
        self.queries, self.width, self.count = queries, self.taps // queries, len(heads)
        # Without a bound on the rank all heads are fitted together; that is exact where it holds by itself.
        self.weights = torch.linalg.solve(self.gram, self.cross)

    def fit(self, rank: int) -> Float[Tensor, "head rank number"]:
        """Returns the rows that make each head's values."""
        stretches = [slice(head * self.taps, (head + 1) * self.taps) for head in range(self.count)]
        factors = [torch.linalg.cholesky(self.gram[stretch, stretch]) for stretch in stretches]
        # By size, so that the order of the sources does not matter.
        order = sorted(range(self.count), key=lambda head: -self._size(stretches[head]))
        rows = torch.zeros(self.count, rank, self.width, dtype=torch.float64)
        for _ in range(_ROUNDS if self.count > 1 else 1):
            for head in order:
                rows[head] = self._fit(stretches[head], factors[head], rank)
        return rows

    def _size(self, stretch: slice) -> float:
        """Returns how large the share of a head is in what all heads make together."""
        weights = self.weights[stretch]
        return float((weights * (self.gram[stretch, stretch] @ weights)).sum())

    def _fit(self, stretch: slice, factor: Tensor, rank: int) -> Float[Tensor, "rank number"]:
        """Returns the rows of a head that suit what the others leave, and takes over its weights."""
        own = self.gram[stretch, stretch]
        rest = self.cross[stretch] - self.gram[stretch] @ self.weights + own @ self.weights[stretch]
        full = torch.cholesky_solve(rest, factor)
        # Queries that share a head's values: their goals stand side by side.
        beside = full.reshape(self.queries, self.width, -1).transpose(0, 1).reshape(self.width, -1)
        inner = own.reshape(self.queries, self.width, self.queries, self.width)
        mean = inner.diagonal(dim1=0, dim2=2).mean(-1)
        _, vectors = torch.linalg.eigh(beside.T @ mean @ beside)
        basis = vectors[:, -rank:]
        rows = beside @ basis
        weights = (rows @ basis.T).reshape(self.width, self.queries, -1).transpose(0, 1)
        self.weights[stretch] = weights.reshape(self.taps, -1)
        padded = torch.zeros(rank, self.width, dtype=torch.float64)
        padded[: rows.shape[1]] = rows.T
        return padded

    def writer(self, rows: Float[Tensor, "head rank number"]) -> Float[Tensor, "outputs inputs"]:
        """Returns what the writer makes of the values that some rows make."""
        spread = torch.block_diag(*(of_head.T for of_head in rows for _ in range(self.queries)))
        gram = spread.T @ self.gram @ spread
        gram.diagonal().add_(_PULL_OF_VALUES * gram.diagonal().mean())
        return torch.linalg.solve(gram, spread.T @ self.goals).T
