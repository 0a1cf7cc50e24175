"""The fusion plan: what every step reads, completes and releases, for every network of the laws."""

from __future__ import annotations

import functools
import random

import networkx as nx
import pytest
from nets import NETS

from mergekit_ot import Start, trace_model
from mergekit_ot.fusion.plan import FusionPlan, build_plan
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.layouts import leaf_groups
from mergekit_ot.graph.order import solve_order


@functools.cache
def graph_of(name: str) -> ModelGraph:
    return trace_model(NETS[name].make(), NETS[name].inputs)


def plan_of(name: str, start: Start = Start.NOTHING) -> FusionPlan:
    graph = graph_of(name)
    return build_plan(graph, frozenset(graph.free_groups), 1, start)


def holds(graph: ModelGraph) -> dict[str, set[str]]:
    """Parameter → the free groups that stand in it."""
    return {
        name: {key for layout in layouts for key in leaf_groups(layout)} & set(graph.free_groups)
        for name, layouts in graph.layouts.items()
    }


every_net = pytest.mark.parametrize("name", NETS)
every_start = pytest.mark.parametrize("start", list(Start), ids=lambda start: start.name)


@every_net
@every_start
def test_every_group_is_solved_exactly_once(name: str, start: Start) -> None:
    plan = plan_of(name, start)
    solved = [key for step in plan.steps for key in step.groups]
    assert sorted(solved) == sorted(graph_of(name).free_groups)
    assert [step.number for step in plan.steps] == list(range(len(plan.steps)))


@every_net
@every_start
def test_every_parameter_is_completed_exactly_once_when_its_last_group_is_solved(name: str, start: Start) -> None:
    plan, held = plan_of(name, start), holds(graph_of(name))
    completed = [parameter for step in plan.steps for parameter in step.completes]
    assert sorted([*completed, *plan.untouched]) == sorted(graph_of(name).layouts)
    assert all(not held[parameter] for parameter in plan.untouched)
    done: set[str] = set()
    for step in plan.steps:
        before, done = done, done | set(step.groups)
        for parameter in step.completes:
            assert held[parameter] <= done
            assert not held[parameter] <= before


@every_net
@every_start
def test_a_step_reads_every_parameter_of_its_groups_and_no_other(name: str, start: Start) -> None:
    held = holds(graph_of(name))
    for step in plan_of(name, start).steps:
        assert set(step.reads) == {parameter for parameter, keys in held.items() if keys & set(step.groups)}
        assert len(set(step.reads)) == len(step.reads)


@every_net
@every_start
def test_what_is_read_is_released_once_after_it_is_read_and_completed_for_the_last_time(
    name: str, start: Start
) -> None:
    plan = plan_of(name, start)
    released = [parameter for step in plan.steps for parameter in step.releases]
    assert sorted(released) == sorted({parameter for step in plan.steps for parameter in step.reads})
    gone: set[str] = set()
    for step in plan.steps:
        assert not gone & {*step.reads, *step.completes}
        gone |= set(step.releases)


@every_net
def test_no_more_is_held_than_later_steps_need(name: str) -> None:
    plan = plan_of(name)
    loaded: set[str] = set()
    for place, step in enumerate(plan.steps):
        loaded = (loaded | set(step.reads)) - set(step.releases)
        assert loaded <= {parameter for later in plan.steps[place + 1 :] for parameter in later.reads}


@every_net
def test_what_lies_behind_a_group_is_solved_before_it(name: str) -> None:
    graph, plan = graph_of(name), plan_of(name)
    step_of = {key: step.number for step in plan.steps for key in step.groups}
    groups = nx.DiGraph((a, b) for a, b in graph.group_graph.edges() if a != b)
    component = {key: number for number, keys in enumerate(nx.strongly_connected_components(groups)) for key in keys}
    for behind, ahead in groups.edges:
        if component[behind] != component[ahead]:
            assert step_of[behind] <= step_of[ahead], f"{ahead} is solved before {behind}"


def test_the_nets_hold_acyclic_and_cyclic_group_graphs() -> None:
    """The control of the test above: both kinds are there, and the acyclic ones have edges to respect."""

    def is_acyclic(name: str) -> bool:
        return nx.is_directed_acyclic_graph(nx.DiGraph((a, b) for a, b in graph_of(name).group_graph.edges() if a != b))

    acyclic = [name for name in NETS if is_acyclic(name)]
    assert {"mlp", "cnn", "densenet", "unet"} <= set(acyclic)
    assert {"resnet_b", "residual_mlp", "attention"}.isdisjoint(acyclic)
    assert list(graph_of("mlp").group_graph.edges()) == [("layers.0.weight:0", "layers.1.weight:0")]


def test_in_a_residual_stream_the_stem_decides() -> None:
    assert solve_order(graph_of("residual_mlp"))[0] == "embed.weight:0"
    assert solve_order(graph_of("resnet_b"))[0] == "conv1.weight:0"


@every_net
@pytest.mark.parametrize("seed", [None, 0])
def test_steps_that_read_a_parameter_in_common_are_ordered_and_no_others(name: str, seed: int | None) -> None:
    plan = plan_of(name)
    order = [step.number for step in plan.steps]
    if seed is not None:
        random.Random(seed).shuffle(order)
    steps = plan.graph(None if seed is None else order)
    assert nx.is_directed_acyclic_graph(steps)
    assert {number: data["step"].number for number, data in steps.nodes(data=True)} == {n: n for n in order}
    for place, later in enumerate(order):
        for earlier in order[:place]:
            common = set(plan.steps[earlier].reads) & set(plan.steps[later].reads)
            assert steps.has_edge(earlier, later) == bool(common)
            assert not steps.has_edge(later, earlier)


def test_groups_that_are_not_to_be_solved_hold_nothing_back() -> None:
    graph = graph_of("mlp")
    plan = build_plan(graph, frozenset({"layers.0.weight:0"}), 1, Start.NOTHING)
    (step,) = plan.steps
    assert set(step.completes) == {"layers.0.weight", "layers.0.bias", "layers.1.weight"}
    assert set(plan.untouched) == {"layers.1.bias", "layers.2.weight", "layers.2.bias"}


@pytest.mark.parametrize("name", ["grouped", "mobile", "attention"])
def test_a_family_is_never_solved_before_the_group_that_indexes_it(name: str) -> None:
    graph = graph_of(name)
    families = {key: group.context for key, group in graph.free_groups.items() if group.context}
    assert families
    for start in Start:
        order = [key for step in plan_of(name, start).steps for key in step.groups]
        for family, context in families.items():
            assert all(order.index(outer) < order.index(family) for outer in context if outer in order)


def test_the_table_has_one_row_per_step() -> None:
    plan = plan_of("cnn")
    rows = plan.describe()
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert sum(row["completes"] for row in rows) + len(plan.untouched) == len(graph_of("cnn").layouts)  # type: ignore[misc]
