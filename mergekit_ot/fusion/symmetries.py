"""The symmetries that a fusion uses, besides the order of neurons."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_ot.fusion.setup import FusionSetup
from mergekit_ot.graph.normal_form.form import NormalForm
from mergekit_ot.graph.symmetry.signs import Sign
from mergekit_ot.graph.symmetry.symmetry import Places
from mergekit_ot.transport.measure import ROTATIONS
from mergekit_ot.transport.solver import AbstractBarycenterSolver


def asked_for(solver: AbstractBarycenterSolver) -> frozenset[str]:
    """Returns the names of the symmetries that a solver's couplings may use."""
    signs = (Sign.name,) if solver.uses_signs else ()
    return frozenset((*signs, *(ROTATIONS if solver.uses_rotations else ())))


def find_symmetries(setup: FusionSetup) -> dict[str, Mapping[str, Places]]:
    """Returns, for each symmetry that a solver of the fusion asks for, where the fused architecture has it."""
    methods = setup.methods
    wanted = frozenset().union(*map(asked_for, methods.solvers))
    if not wanted:
        return {}
    # Some solvers ask for none, and what proves them takes time to import.
    from mergekit_ot.graph.symmetry.planted import PlantedProof, find_proven

    models = setup.models
    form = NormalForm() if models.normal is None else models.normal.form
    proof = PlantedProof(models.target.make, setup.inputs, form=form)
    return {
        symmetry.name: find_proven(symmetry, models.target_graph, proof)
        for symmetry in methods.symmetries
        if symmetry.name in wanted
    }


def symmetries_for(
    found: Mapping[str, Mapping[str, Places]], solver: AbstractBarycenterSolver
) -> dict[str, Mapping[str, Places]]:
    """Returns, of the symmetries of a fusion, those that a solver asks for."""
    wanted = asked_for(solver)
    return {name: places for name, places in found.items() if name in wanted}
