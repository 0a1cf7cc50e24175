"""Node rules and a solver that other plugins have, registered by a distribution of its own."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_ot import NodeRule, hookimpl


@hookimpl
def mergeot_node_rules() -> Mapping[str, NodeRule | str]:
    """Return the rules of the layers package."""
    import mergeot_layers

    return mergeot_layers.mergeot_node_rules()


@hookimpl
def mergeot_node_measures() -> Mapping[str, str]:
    """Return the measure that the loopback solver asks for."""
    return {"loopback-weights": "mergeot_loopback.solver:LoopbackMeasure"}


@hookimpl
def mergeot_solvers() -> Mapping[str, str]:
    """Return the Wasserstein barycenter under another name."""
    return {"loopback": "mergeot_loopback.solver:LoopbackSolver"}
