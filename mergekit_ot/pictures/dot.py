"""A model graph's neuron groups as records, and as a Graphviz file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import networkx as nx

from mergekit_ot.text import visible

if TYPE_CHECKING:
    from mergekit_ot.graph.ir import ModelGraph, NeuronGroup


def group_rows(graph: ModelGraph) -> list[dict[str, Any]]:
    """Returns one record per neuron group: its size, where it stands, and why it may not be reordered.

    Example:
        >>> import torch
        >>> from mergekit_ot import trace_model
        >>> rows = group_rows(trace_model(torch.nn.Linear(3, 2), torch.randn(2, 3)))
        >>> [(row["name"], row["why"]) for row in rows]
        [('weight:0', 'model output [output]'), ('weight:1', 'model input')]
    """
    return [_row(graph, group) for group in graph.groups.values()]


def _row(graph: ModelGraph, group: NeuronGroup) -> dict[str, Any]:
    return {
        "name": group.key,
        "size": group.size,
        "orders": graph.family_size(group.key) if group.is_free else 0,
        "status": "pinned" if group.pin is not None else "free" if group.is_free else "single neuron",
        "members": [f"{slot.parameter}:{slot.axis} {slot.role}" for slot in group.members],
        "flags": sorted(group.flags),
        "why": None if group.pin is None else str(group.pin),
    }


def group_dot(graph: ModelGraph) -> str:
    """Returns the free groups in Graphviz' language: an edge per parameter that reads one and makes another.

    Example:
        >>> import torch
        >>> from mergekit_ot import trace_model
        >>> group_dot(trace_model(torch.nn.Linear(3, 2), torch.randn(2, 3))).splitlines()[0]
        'digraph groups {'
    """
    network = graph.group_graph
    lines = ["digraph groups {", "  node [shape=box, style=rounded, fontname=monospace];"]
    for key, data in network.nodes(data=True):
        lines.append(f'  {_quoted(key)} [label="{_escaped(key)}\\n{data["size"]} neurons"];')
    for before, after, parameters in _edges(network):
        lines.append(f"  {_quoted(before)} -> {_quoted(after)} [label={_quoted(', '.join(parameters))}];")
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str) -> str:
    return f'"{_escaped(text)}"'


def _escaped(text: str) -> str:
    return visible(text).replace("\\", "\\\\").replace('"', '\\"')


def _edges(network: nx.MultiDiGraph) -> list[tuple[str, str, list[str]]]:
    parameters: dict[tuple[str, str], list[str]] = {}
    for before, after, data in network.edges(data=True):
        parameters.setdefault((before, after), []).append(data.get("parameter") or "family")
    return [(before, after, sorted(set(names))) for (before, after), names in sorted(parameters.items())]
