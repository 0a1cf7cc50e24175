"""Under which names parameters stand among the operations of a graph."""

from __future__ import annotations

from collections.abc import Collection

from mergekit_ot.graph.ir import ModelGraph


def operands(graph: ModelGraph, names: Collection[str]) -> dict[str, str]:
    """Returns parameter → its name among the operations; one that stands nowhere there has none.

    Args:
        graph: The model's graph.
        names: The parameters.

    Example:
        >>> import torch
        >>> from mergekit_ot import trace_model
        >>> operands(trace_model(torch.nn.Linear(3, 2), torch.randn(4, 3)), ["weight"])
        {'weight': 'p_weight'}
    """
    usual = {name: "p_" + name.replace(".", "_") for name in names}
    found = {name: place for name, place in usual.items() if place in graph.operations}
    if found or graph.program is None:
        return found
    # Another front end gives names of its own, which the program alone knows.
    return {name: node.name for node, name in graph.program.state_names.items() if name in usual}
