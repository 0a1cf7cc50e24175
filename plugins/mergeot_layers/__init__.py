"""The node rules (how the neurons of aten operations correspond) and the symmetries of layers."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_ot import NodeRule, hookimpl


@hookimpl
def mergeot_node_rules() -> Mapping[str, NodeRule | str]:
    """Return the rules of all layers that this package knows."""
    from mergeot_layers.arranging import ARRANGING
    from mergeot_layers.distances import DISTANCES
    from mergeot_layers.draws import DRAWS
    from mergeot_layers.elementwise import ELEMENTWISE
    from mergeot_layers.in_order import IN_ORDER
    from mergeot_layers.indexing import INDEXING
    from mergeot_layers.lines import LINES
    from mergeot_layers.movements import MOVEMENTS
    from mergeot_layers.products import PRODUCTS
    from mergeot_layers.recurrent import RECURRENT
    from mergeot_layers.reductions import REDUCTIONS
    from mergeot_layers.spatial import SPATIAL

    plain = {**LINES, **ELEMENTWISE, **MOVEMENTS, **ARRANGING, **DRAWS}
    return {**plain, **REDUCTIONS, **PRODUCTS, **DISTANCES, **RECURRENT, **INDEXING, **IN_ORDER, **SPATIAL}


@hookimpl
def mergeot_symmetries() -> Mapping[str, str]:
    """Return what layers allow to be done to their neurons: another order, and of the rest the largest kind first."""
    return {
        "order": "mergekit_ot:Order",
        "invertible": "mergekit_ot:Invertible",
        "orthogonal": "mergekit_ot:Orthogonal",
        "orthogonal with fixed mean": "mergekit_ot:OrthogonalWithFixedMean",
        "rotary": "mergekit_ot:RotaryPlanes",
        "positive scale": "mergekit_ot:PositiveScale",
        "sign": "mergekit_ot:Sign",
    }
