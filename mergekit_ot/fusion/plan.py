"""The fusion plan: which groups are solved when, and what each step reads, completes and releases.

The plan is a graph of steps. An executor runs it; the serial one is a plugin, and so is any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.layouts import AxisLayout, leaf_groups
from mergekit_ot.graph.order import solve_order
from mergekit_ot.transport.solver import Start

if TYPE_CHECKING:
    import networkx as nx


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
        import networkx as nx

        graph = nx.DiGraph()
        for number, earlier in self.waits(order).items():
            graph.add_node(number, step=self.steps[number])
            graph.add_edges_from((each, number) for each in earlier)
        return graph

    def waits(self, order: Sequence[int] | None = None) -> dict[int, list[int]]:
        """Returns, for each step of a sweep, the earlier ones that read a parameter of it: the edges of `graph`.

        Args:
            order: Numbers of the steps in the order of the sweep; their own order by default.
        """
        ordered = [self.steps[number] for number in order] if order is not None else list(self.steps)
        reads = [(step.number, frozenset(step.reads)) for step in ordered]
        return {
            number: [before for before, others in reads[:place] if not own.isdisjoint(others)]
            for place, (number, own) in enumerate(reads)
        }

    def describe(self) -> list[dict[str, object]]:
        """Returns one record per step for a table."""
        return [
            {
                "step": step.number,
                "groups": ", ".join(step.groups),
                "reads": len(step.reads),
                "completes": len(step.completes),
                "releases": len(step.releases),
            }
            for step in self.steps
        ]


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
    planner = _Planner(graph, order)
    batches = planner.batches(start)
    steps = planner.steps(batches)
    untouched = tuple(name for name, keys in planner.holds.items() if not set(keys) & groups)
    return FusionPlan(tuple(steps), max_sweeps, start, untouched)


class _Planner:
    """Which parameters hold which groups, and what follows for the steps.

    Args:
        graph: Graph of the fused model.
        order: The groups to solve, in order.
    """

    def __init__(self, graph: ModelGraph, order: list[str]) -> None:
        self.graph, self.order = graph, order
        self.holds = {name: _groups_in(layouts) for name, layouts in graph.layouts.items()}
        self.parameters = {key: [name for name, keys in self.holds.items() if key in keys] for key in order}

    def batches(self, start: Start) -> list[tuple[str, ...]]:
        """Returns the groups of each step: a group together with the families indexed by it that are ready with it."""
        batches: list[tuple[str, ...]] = []
        done: set[str] = set()
        families = sorted(self.order, key=lambda key: len(self.graph.groups[key].context))
        for key in self.order:
            if key in done:
                continue
            batch = [key]
            for family in families:
                solved = done | set(batch)
                if family not in solved and self._goes_with(family, key, solved, start):
                    batch.append(family)
            done |= set(batch)
            batches.append(tuple(batch))
        return batches

    def _goes_with(self, family: str, key: str, solved: set[str], start: Start) -> bool:
        """Whether a family is indexed by a group, and can be solved once that is."""
        outer = self.graph.groups[family].context
        if key not in outer or not set(outer) <= solved:
            return False
        return start is Start.IDENTITY or self._is_ready(family, solved | {family})

    def _is_ready(self, key: str, aligned: set[str]) -> bool:
        members = {slot.parameter for slot in self.graph.groups[key].members} - set(self.graph.buffers)
        groups = set(self.order)
        return any(set(self.holds[name]) & groups <= aligned for name in members)

    def steps(self, batches: list[tuple[str, ...]]) -> list[Step]:
        """Returns the steps: what each reads, completes and releases."""
        groups = set(self.order)
        left = {name: set(keys) & groups for name, keys in self.holds.items()}
        reads = [self._read_by(batch) for batch in batches]
        last = {name: number for number, names in enumerate(reads) for name in names}
        steps = []
        for number, (batch, names) in enumerate(zip(batches, reads, strict=True)):
            for name in names:
                left[name] -= set(batch)
            completes = tuple(name for name in names if not left[name])
            releases = tuple(name for name in names if last[name] == number)
            steps.append(Step(number, batch, names, completes, releases))
        return steps

    def _read_by(self, batch: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for key in batch for name in self.parameters[key]))


def _groups_in(layouts: Sequence[AxisLayout]) -> list[str]:
    return [key for layout in layouts for key in leaf_groups(layout)]
