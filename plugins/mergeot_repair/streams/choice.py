"""Chooses heads and neurons among those of all sources, and the values that the chosen heads mix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergeot_repair.refit.pruning import Products, Regression, eliminate

# Pull of the regressions on patterns, relative to the mean square of an input.
PULL = 1e-3
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


def start_of_units(products: Products, units: Int[Tensor, " unit"], outputs: int) -> Float[Tensor, "outputs unit"]:
    """Returns what the writer makes of chosen neurons."""
    gram, cross, _ = products.towards(torch.eye(outputs))
    return torch.linalg.solve(gram[units][:, units], cross[units]).T


class Values:
    """The values of chosen heads, by reduced-rank regression, head after head (Izenman 1975).

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
        gram, cross, _ = products.towards(root)
        taps = len(gram) // count
        columns = (heads[:, None] * taps + torch.arange(taps)).flatten()
        self.gram, self.cross = gram[columns][:, columns], cross[columns]
        self.goals = products.towards(torch.eye(len(root)))[1][columns]
        self.taps, self.queries, self.count = taps, queries, len(heads)
        self.weights = torch.zeros_like(self.cross)

    def fit(self, rank: int) -> Float[Tensor, "head rank number"]:
        """Returns the rows that make each head's values."""
        factors = [self._factor(head) for head in range(self.count)]
        rows = torch.zeros(self.count, rank, self.taps // self.queries, dtype=torch.float64)
        for _ in range(_ROUNDS if self.count > 1 else 1):
            for head in range(self.count):
                rows[head] = self._fit(head, factors[head], rank)
        return rows

    def start(self, rows: Float[Tensor, "head rank number"]) -> Float[Tensor, "outputs inputs"]:
        """Returns what the writer makes of the values that some rows make."""
        spread = torch.block_diag(*(torch.block_diag(*[of_head.T] * self.queries) for of_head in rows))
        gram = spread.T @ self.gram @ spread
        gram.diagonal().add_(1e-6 * gram.diagonal().mean())
        return torch.linalg.solve(gram, spread.T @ self.goals).T

    def _stretch(self, head: int) -> slice:
        return slice(head * self.taps, (head + 1) * self.taps)

    def _factor(self, head: int) -> Tensor:
        of_head = self._stretch(head)
        return torch.linalg.cholesky(self.gram[of_head, of_head])

    def _fit(self, head: int, factor: Tensor, rank: int) -> Float[Tensor, "rank number"]:
        of_head = self._stretch(head)
        own = self.gram[of_head, of_head]
        rest = self.cross[of_head] - self.gram[of_head] @ self.weights + own @ self.weights[of_head]
        full = torch.cholesky_solve(rest, factor)
        width = self.taps // self.queries
        # Queries that share a head's values: their goals stand side by side.
        beside = full.reshape(self.queries, width, -1).transpose(0, 1).reshape(width, -1)
        inner = own.reshape(self.queries, width, self.queries, width).diagonal(dim1=0, dim2=2).mean(-1)
        _, vectors = torch.linalg.eigh(beside.T @ inner @ beside)
        basis = vectors[:, -rank:]
        rows = beside @ basis
        made = (rows @ basis.T).reshape(width, self.queries, -1).transpose(0, 1)
        self.weights[of_head] = made.reshape(self.taps, -1)
        padded = torch.zeros(rank, width, dtype=torch.float64)
        padded[: rows.shape[1]] = rows.T
        return padded
