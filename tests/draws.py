"""Random measures and couplings with signs, in double precision, and the pairs of neurons that a coupling joins."""

from __future__ import annotations

import torch

from mergekit_ot import Coupling, NeuronMeasure, Permutation, Plan, Signs


class Draw:
    """Random numbers of one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def gaussian(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def coin(self, *shape: int) -> torch.Tensor:
        return torch.randint(0, 2, shape, generator=self.generator).bool()

    def signs(self, columns: int, slices: int) -> Signs:
        return Signs(self.coin(columns), self.coin(slices), self.coin(slices))

    def sign(self, *shape: int) -> torch.Tensor:
        return 1.0 - 2.0 * self.coin(*shape).double()

    def measure(self, size: int, columns: int, slices: int, signs: Signs | None) -> NeuronMeasure:
        structure = self.gaussian(slices, size, size) if slices else None
        return NeuronMeasure.uniform(self.gaussian(size, columns), structure, signs)

    def coupling(self, rows: int, columns: int, is_partial: bool = False) -> Coupling:
        """A permutation where the sizes are equal, or a plan; of a partial one some rows are empty."""
        if rows == columns and not is_partial and bool(self.coin(1)):
            return Permutation(torch.randperm(rows, generator=self.generator), sign=self.sign(rows))
        plan = torch.rand(rows, columns, generator=self.generator, dtype=torch.float64) + 0.1
        if is_partial:
            plan[: rows // 2] = 0
        return Plan(plan / plan.sum(), sign=self.sign(rows, columns))


def pairs(coupling: Coupling) -> list[tuple[int, int, float, float]]:
    """(fused neuron, source neuron, mass, sign) of every pair that is coupled."""
    found = []
    for j in range(coupling.target_size):
        for k in range(coupling.source_size):
            if isinstance(coupling, Permutation):
                mass = float(int(coupling.index[j]) == k) / coupling.target_size
                sign = 1.0 if coupling.sign is None else float(coupling.sign[j])
            else:
                assert isinstance(coupling, Plan)
                mass = float(coupling.matrix[j, k])
                sign = 1.0 if coupling.sign is None else float(coupling.sign[j, k])
            if mass > 0:
                found.append((j, k, mass, sign))
    return found
