"""Module rules for models of the `transformers` library whose operations do not tell what they do.

Nothing here imports `transformers`: a module is known by the name of its class.
"""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_ot import NodeRule, hookimpl


@hookimpl
def mergeot_node_rules() -> Mapping[str, NodeRule | str]:
    """Return rules of modules, by class name."""
    from mergeot_transformers.experts import EXPERTS

    return EXPERTS
