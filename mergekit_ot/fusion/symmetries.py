"""The symmetries that a fusion uses, besides the order of neurons."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_ot.fusion.setup import FusionSetup
from mergekit_ot.graph.symmetry.signs import Sign
from mergekit_ot.graph.symmetry.symmetry import Places
from mergekit_ot.transport.solver import AbstractBarycenterSolver


def asked_for(solver: AbstractBarycenterSolver) -> frozenset[str]:
    """Returns the names of the symmetries that a solver's couplings may use."""
    return frozenset({Sign.name} if solver.uses_signs else ())


def find_symmetries(setup: FusionSetup) -> dict[str, Mapping[str, Places]]:
    """Returns, for each symmetry that a solver of the fusion asks for, where the fused architecture has it."""
    methods = setup.methods
    solvers = [solver for solver in (methods.solver, methods.refinement) if solver is not None]
    wanted = frozenset().union(*map(asked_for, solvers))
    if not wanted:
        return {}
    # Most solvers ask for none, and what proves them takes time to import.
    from mergekit_ot.graph.symmetry.planted import PlantedProof, find_proven

    proof = PlantedProof(setup.models.target.make, setup.inputs)
    return {
        symmetry.name: find_proven(symmetry, setup.models.target_graph, proof)
        for symmetry in methods.symmetries
        if symmetry.name in wanted
    }
