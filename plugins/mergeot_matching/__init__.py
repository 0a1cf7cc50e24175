"""Alignment by assignment: weight matching, activation matching, vanilla averaging; and clusters of neurons."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_ot import hookimpl


@hookimpl
def mergeot_solvers() -> Mapping[str, str]:
    """Returns the solvers of this package by name."""
    return {
        "weight-matching": "mergeot_matching.solver:WeightMatchingSolver",
        "activation-matching": "mergeot_matching.solver:ActivationMatchingSolver",
        "zip": "mergeot_matching.zipping:ZipSolver",
        "average": "mergeot_matching.average:AverageSolver",
    }
