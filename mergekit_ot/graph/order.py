"""In which order the neuron groups of a model are solved."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping

from mergekit_ot.graph.ir import ModelGraph


def solve_order(graph: ModelGraph) -> list[str]:
    """Returns the keys of the free groups so that, as far as possible, what lies behind a group comes first.

    Self-loops are dropped and cycles (a residual stream and the groups inside its blocks) condensed; inside a cycle
    the first operation that makes a group decides, so that the stem or the embedding decides a residual stream.
    """
    after: dict[str, dict[str, None]] = {key: {} for key in graph.free_groups}
    for key, other, _ in graph.group_edges():
        if key != other:
            after[key][other] = None
    cycles = _cycles(after)

    def first(key: str) -> tuple[int, int, str]:
        group = graph.groups[key]
        return group.first_operation, len(group.context), key

    members: dict[int, list[str]] = {}
    for key, cycle in cycles.items():
        members.setdefault(cycle, []).append(key)
    edges = {(cycles[key], cycles[other]) for key, others in after.items() for other in others}
    ahead: dict[int, list[int]] = {cycle: [] for cycle in members}
    waits = dict.fromkeys(members, 0)
    for cycle, other in edges:
        if cycle != other:
            ahead[cycle].append(other)
            waits[other] += 1
    ready = [(min(map(first, members[cycle])), cycle) for cycle, count in waits.items() if not count]
    heapq.heapify(ready)
    order: list[str] = []
    while ready:
        _, cycle = heapq.heappop(ready)
        order += sorted(members[cycle], key=first)
        for other in ahead[cycle]:
            waits[other] -= 1
            if not waits[other]:
                heapq.heappush(ready, (min(map(first, members[other])), other))
    return order


def _cycles(after: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """Returns for each node the number of the cycle that it is in; two are in one if each leads to the other.

    Tarjan's algorithm, without recursion.
    """
    entered: dict[str, int] = {}
    lowest: dict[str, int] = {}
    found: dict[str, int] = {}
    trail: list[str] = []
    for root in after:
        path = [] if root in entered else [(root, iter(after[root]))]
        while path:
            node, left = path[-1]
            if node not in entered:
                entered[node] = lowest[node] = len(entered)
                trail.append(node)
            step = next((other for other in left if other not in found), None)
            if step is None:
                path.pop()
                if lowest[node] == entered[node]:
                    while node not in found:
                        found[trail.pop()] = entered[node]
                elif path:
                    lowest[path[-1][0]] = min(lowest[path[-1][0]], lowest[node])
            elif step in entered:
                lowest[node] = min(lowest[node], entered[step])
            else:
                path.append((step, iter(after[step])))
    return found
