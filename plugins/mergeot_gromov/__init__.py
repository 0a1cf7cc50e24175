"""Fused Gromov-Wasserstein barycenters of neuron measures that refer to themselves: `gwb`, and `refinement`."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_ot import hookimpl


@hookimpl
def mergeot_solvers() -> Mapping[str, str]:
    """Returns the solvers of this package by name."""
    return {
        "gwb": "mergeot_gromov.solver:GromovBarycenterSolver",
        "refinement": "mergeot_gromov.refinement:RefinementSolver",
    }
