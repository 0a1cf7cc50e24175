"""Fused Gromov-Wasserstein barycenter of neuron measures (arXiv:2210.06671, section on recurrent layers)."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_ot import BarycenterProblem, Solution
from mergeot_gromov.descent import AbstractGromovSolver


@dataclass(frozen=True)
class GromovBarycenterSolver(AbstractGromovSolver):
    """Looks for couplings from many starts: recurrent weights, or distances between neurons, say who is whose."""

    name = "gwb"
    summary = "fused Gromov-Wasserstein barycenter with asymmetric structure (arXiv:2210.06671)"
    wants_structure = True

    def find(self, problem: BarycenterProblem) -> Solution:
        """Returns the best couplings over all starts."""
        return self.from_all_starts(problem)
