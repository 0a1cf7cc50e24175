"""The fusion plan: which groups are solved when, and what each step reads, completes and releases.

The plan is a graph of steps. An executor runs it; the serial one is a plugin, and so is any other.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from mergekit_ot.graph.ir import ModelGraph, leaf_groups
from mergekit_ot.graph.order import solve_order
from mergekit_ot.transport.solver import Start


@dataclass(frozen=True)
class Step:
    """One step of a plan.

    Attributes:
        number: Place in the plan.
        groups: The groups it solves: one, followed by the families indexed by it where they are solved with it.
        reads: Parameters it reads.
        completes: Parameters whose every axis is aligned after it: they are transported and averaged.
        releases: Parameters that no later step reads.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mergekit_ot import fuse
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> first, second = fuse([net, net], solver="wb", example_inputs=torch.randn(2, 4)).plan.steps
        >>> first.groups, first.reads, first.completes
        (('0.weight:0',), ('0.weight', '0.bias', '2.weight'), ('0.weight', '0.bias'))
    """

    number: int
    groups: tuple[str, ...]
    reads: tuple[str, ...]
    completes: tuple[str, ...]
    releases: tuple[str, ...]


@dataclass(frozen=True)
class FusionPlan:
    """The steps of one sweep, and what is fixed before the first.

    Attributes:
        steps: In order.
        max_sweeps: Sweeps at most; 0 leaves every group at the identity.
        start: What counts as aligned before the first step.
        untouched: Parameters that hold no group: they are averaged as they are.
    """

    steps: tuple[Step, ...]
    max_sweeps: int
    start: Start
    untouched: tuple[str, ...]

    def graph(self, order: Sequence[int] | None = None) -> nx.DiGraph:
        """Returns the graph of steps: an edge where a later step reads a parameter of an earlier one.

        Args:
            order: Numbers of the steps in the order of the sweep; their own order by default.
        """
        graph = nx.DiGraph()
        ordered = [self.steps[number] for number in order] if order is not None else list(self.steps)
        for place, step in enumerate(ordered):
            graph.add_node(step.number, step=step)
            for earlier in ordered[:place]:
                if set(earlier.reads) & set(step.reads):
                    graph.add_edge(earlier.number, step.number)
        return graph

    def describe(self) -> list[dict[str, object]]:
        """Returns one record per step for a table."""
        return [
            {"step": s.number, "groups": ", ".join(s.groups), "reads": len(s.reads), "completes": len(s.completes),
             "releases": len(s.releases)}
            for s in self.steps
        ]  # fmt: skip


class AbstractExecutor(abc.ABC):
    """Runs the steps of a plan, in any order that its graph allows.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from types import SimpleNamespace
        >>> from mergekit_ot import PluginManager, fuse, hookimpl
        >>> class Telling(AbstractExecutor):
        ...     def run(self, steps, run_step):
        ...         for number in nx.topological_sort(steps):
        ...             print("solves", *steps.nodes[number]["step"].groups)
        ...             run_step(steps.nodes[number]["step"])
        >>> manager = PluginManager.load()
        >>> hook = hookimpl(lambda: {"telling": Telling})
        >>> manager.register(SimpleNamespace(mergeot_executors=hook), "mine")
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> inputs = torch.randn(2, 4)
        >>> result = fuse([net, net], solver="wb", example_inputs=inputs, executor="telling", manager=manager)
        solves 0.weight:0
        solves 2.weight:0
    """

    @abc.abstractmethod
    def run(self, steps: nx.DiGraph, run_step: Callable[[Step], None]) -> None:
        """Calls `run_step` once for every node's ``step``, after its predecessors."""


def build_plan(graph: ModelGraph, groups: frozenset[str], max_sweeps: int, start: Start) -> FusionPlan:
    """Returns the plan that solves `groups` of the fused model's graph.

    Args:
        graph: Graph of the fused model.
        groups: Keys of the groups to solve.
        max_sweeps: From the solver.
        start: From the solver.
    """
    order = [key for key in solve_order(graph) if key in groups]
    order += sorted(groups - set(order))
    holds = {name: [k for layout in layouts for k in leaf_groups(layout)] for name, layouts in graph.layouts.items()}
    parameters = {key: [name for name in holds if key in holds[name]] for key in order}
    batches = _with_families(graph, order, holds, start)
    left = {name: set(keys) & groups for name, keys in holds.items()}
    last = {name: number for number, batch in enumerate(batches) for key in batch for name in parameters[key]}
    steps = []
    for number, batch in enumerate(batches):
        reads = tuple(dict.fromkeys(name for key in batch for name in parameters[key]))
        for name in reads:
            left[name] -= set(batch)
        completes = tuple(name for name in reads if not left[name])
        releases = tuple(name for name in reads if last[name] == number)
        steps.append(Step(number, batch, reads, completes, releases))
    untouched = tuple(name for name, keys in holds.items() if not set(keys) & groups)
    return FusionPlan(tuple(steps), max_sweeps, start, untouched)


def _with_families(
    graph: ModelGraph, order: list[str], holds: Mapping[str, list[str]], start: Start
) -> list[tuple[str, ...]]:
    """Returns the groups of each step: a group together with the families indexed by it that are ready with it."""
    batches: list[tuple[str, ...]] = []
    done: set[str] = set()
    for key in order:
        if key in done:
            continue
        batch = [key]
        for other in sorted(order, key=lambda k: len(graph.groups[k].context)):
            outer = graph.groups[other].context
            if other in done or other in batch or key not in outer or not set(outer) <= done | set(batch):
                continue
            if start is Start.IDENTITY or _is_ready(graph, other, done | set(batch) | {other}, holds, set(order)):
                batch.append(other)
        done |= set(batch)
        batches.append(tuple(batch))
    return batches


def _is_ready(graph: ModelGraph, key: str, aligned: set[str], holds: Mapping[str, list[str]], groups: set[str]) -> bool:
    members = {slot.parameter for slot in graph.groups[key].members if slot.parameter not in graph.buffers}
    return any(set(holds[name]) & groups <= aligned for name in members)
