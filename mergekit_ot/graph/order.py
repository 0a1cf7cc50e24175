"""In which order the neuron groups of a model are solved."""

from __future__ import annotations

import networkx as nx

from mergekit_ot.graph.ir import ModelGraph


def solve_order(graph: ModelGraph) -> list[str]:
    """Returns the keys of the free groups so that, as far as possible, what lies behind a group comes first.

    Self-loops are dropped and cycles (a residual stream and the groups inside its blocks) condensed; inside a cycle
    the first operation that makes a group decides, so that the stem or the embedding decides a residual stream.
    """
    groups = nx.DiGraph()
    groups.add_nodes_from(graph.group_graph.nodes)
    groups.add_edges_from((a, b) for a, b, _ in graph.group_graph.edges if a != b)
    condensed = nx.condensation(groups)
    members = condensed.nodes(data="members")

    def first(key: str) -> tuple[int, int, str]:
        group = graph.groups[key]
        return group.first_operation, len(group.context), key

    earliest = {component: min(map(first, keys)) for component, keys in members}
    order: list[str] = []
    for component in nx.lexicographical_topological_sort(condensed, key=earliest.__getitem__):
        order += sorted(condensed.nodes[component]["members"], key=first)
    return order
