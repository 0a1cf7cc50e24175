"""An embedding that is read as well stays tied: what is left to fit is the norm before it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_PULL = 1e-6


class NormFit:
    """Regression of the gains and the shifts of a norm whose result an embedding's weight reads.

    The results are ``(read * gains + shifts) @ embedding.T``, linear in both.

    Args:
        embedding: As it is read ``[result, neuron]``.
    """

    def __init__(self, embedding: Float[Tensor, "result neuron"]) -> None:
        self.embedding = embedding.double()
        width = embedding.shape[1]
        self.gram = torch.zeros(width, width, dtype=torch.float64)
        self.sums, self.products, self.wanted = (torch.zeros(width, dtype=torch.float64) for _ in range(3))
        self.count = 0

    def add(self, read: Float[Tensor, "place neuron"], goals: Float[Tensor, "place result"]) -> None:
        """Adds a batch: what the norm makes without gains and shifts, and the results that are wanted."""
        back = goals @ self.embedding.to(goals.dtype)
        self.gram += read.T @ read
        self.sums += read.sum(0)
        self.products += (read * back).sum(0)
        self.wanted += back.sum(0)
        self.count += len(read)

    def solve(self, has_gains: bool, has_shifts: bool) -> tuple[Float[Tensor, " neuron"], Float[Tensor, " neuron"]]:
        """Returns the gains and the shifts."""
        inner = self.embedding.T @ self.embedding
        width = len(inner)
        mixed = inner * self.sums
        matrix = torch.cat(
            [torch.cat([inner * self.gram, mixed.T], 1), torch.cat([mixed, self.count * inner], 1)]
        )
        goals = torch.cat([self.products, self.wanted])
        start = torch.cat([torch.ones(width), torch.zeros(width)]).double()
        is_free = torch.cat([torch.full((width,), has_gains), torch.full((width,), has_shifts)])
        rest = (goals - matrix @ start)[is_free]
        matrix = matrix[is_free][:, is_free]
        if len(matrix):
            matrix.diagonal().add_(_PULL * matrix.diagonal().mean())
            start[is_free] += torch.linalg.solve(matrix, rest)
        return start[:width], start[width:]
