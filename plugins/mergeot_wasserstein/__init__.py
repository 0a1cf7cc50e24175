"""Wasserstein barycenters of neuron measures: free support (`wb`) and support fixed to one source (`otfusion`)."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_ot import hookimpl


@hookimpl
def mergeot_solvers() -> Mapping[str, str]:
    """Returns the solvers of this package by name."""
    return {
        "wb": "mergeot_wasserstein.solver:WassersteinBarycenterSolver",
        "otfusion": "mergeot_wasserstein.fixed_support:FixedSupportSolver",
    }
