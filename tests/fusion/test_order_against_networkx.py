"""The order of steps and groups is that of networkx, which is loaded only where a graph is asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_ot import SolverError
from mergekit_ot.fusion.executor import TaskQueue
from mergekit_ot.graph.order import solve_order

numbers = st.integers(1, 9)


def by_networkx(graph: Any) -> list[str]:
    """What `solve_order` says, in the words of networkx."""
    groups = nx.DiGraph()
    groups.add_nodes_from(graph.free_groups)
    groups.add_edges_from((a, b) for a, b, _ in graph.group_edges() if a != b)
    condensed = nx.condensation(groups)

    def first(key: str) -> tuple[int, int, str]:
        group = graph.groups[key]
        return group.first_operation, len(group.context), key

    members = {component: sorted(keys, key=first) for component, keys in condensed.nodes(data="members")}
    order: list[str] = []
    for component in nx.lexicographical_topological_sort(condensed, key=lambda each: first(members[each][0])):
        order += members[component]
    return order


@settings(max_examples=300, deadline=None)
@given(numbers, st.data())
def test_groups_are_solved_in_the_order_of_networkx(count: int, data: st.DataObject) -> None:
    keys = [f"group {number}" for number in range(count)]
    pairs = data.draw(st.lists(st.tuples(st.sampled_from(keys), st.sampled_from(keys)), max_size=3 * count))
    made = st.builds(SimpleNamespace, first_operation=st.integers(0, 4), context=st.sampled_from([(), ("outer",)]))
    groups = {key: data.draw(made) for key in keys}
    graph: Any = SimpleNamespace(
        groups=groups, free_groups=groups, group_edges=lambda: [(one, other, None) for one, other in pairs]
    )
    assert solve_order(graph) == by_networkx(graph)


@settings(max_examples=200, deadline=None)
@given(numbers, st.data())
def test_steps_are_taken_in_the_order_of_networkx(count: int, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(count)))
    waits = {number: [e for e in order[:place] if data.draw(st.booleans())] for place, number in enumerate(order)}
    steps = nx.DiGraph()
    for number, earlier in waits.items():
        steps.add_node(number)
        steps.add_edges_from((before, number) for before in earlier)
    taken = []
    for given_steps in (waits, steps):
        queue = TaskQueue(given_steps, lambda number: number, lambda solution: None)  # type: ignore[arg-type, return-value]
        taken.append(list(queue._waits))
    assert taken[0] == taken[1] == list(nx.topological_sort(steps))


def test_steps_that_wait_for_each_other_are_told() -> None:
    with pytest.raises(SolverError, match=r"Steps \[1, 2\] wait for each other"):
        TaskQueue({0: [], 1: [2], 2: [1]}, lambda number: number, lambda solution: None)  # type: ignore[arg-type, return-value]
