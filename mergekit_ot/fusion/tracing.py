"""The graphs of a fusion: each architecture is traced once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from mergekit_ot.errors import ArchitectureError, RecipeError
from mergekit_ot.fusion.normal_states import NormalStates
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.fusion.trace_memory import TraceMemory
from mergekit_ot.graph.capture.description import ModuleDescription, described_module
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.pinning import pinned, refuted_groups


def is_same_architecture(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules differ in the values of their tensors at most, so that one trace serves both."""
    return described_module(one).is_same(described_module(other))


class Tracer:
    """Traces each architecture once, however many sources share it.

    Args:
        trace: Gives the graph of a fresh module.
        memory: Where the graphs of earlier runs are looked up.
        prove: Gives the graph of a source without what other cases than the traced one refute, where a module asks.
    """

    def __init__(
        self,
        trace: Callable[[nn.Module], ModelGraph],
        memory: TraceMemory | None = None,
        prove: Callable[[SourceModel, ModelGraph], ModelGraph] | None = None,
    ) -> None:
        self._trace_module, self.memory, self._prove = trace, memory, prove
        self.traced: list[tuple[SourceModel, ModuleDescription, ModelGraph]] = []

    def graph_of(self, source: SourceModel) -> ModelGraph:
        """Returns the graph of a source."""
        for other, _, graph in self.traced:
            if other.make is source.make:
                return graph
        model = source.make()
        # Kept instead of the module, which holds weights.
        description = described_module(model)
        for _, known, graph in self.traced:
            if description.is_same(known):
                return graph
        graph = self._found(source, model, description)
        self.traced.append((source, description, graph))
        # It was not run.
        source.architecture.give_back(model)
        return graph

    def trace(self, source: SourceModel, model: nn.Module) -> ModelGraph:
        """Returns the graph of a fresh module of a source; where its code asks something, both answers are tried."""
        graph = self._trace_module(model)
        asks = graph.program is not None and bool(graph.program.branches)
        return graph if self._prove is None or not asks else self._prove(source, graph)

    def _found(self, source: SourceModel, model: nn.Module, description: ModuleDescription) -> ModelGraph:
        """Returns a graph that is remembered, or traces and remembers it."""
        # Before the trace, which may import modules that the key looks at.
        key = None if self.memory is None else self.memory.key(model, description)
        if self.memory is None or key is None:
            return self.trace(source, model)
        # A trace is kept without its program, which fusions by weights alone do not need.
        graph = self.memory.recall(key, model, lambda: self.trace(source, source.make()))
        if graph is None:
            graph = self.trace(source, model)
            self.memory.keep(key, graph)
        return graph


@dataclass(frozen=True)
class TracedModels:
    """The networks of a fusion with their graphs, which differ by the sizes of groups at most.

    Attributes:
        sources: In the user's order.
        graphs: One per source.
        target: The architecture whose sizes the fused model takes.
        target_graph: Its graph.
        normal: How the states were rewritten into their normal forms; None where they are as they were given.
        originals: The sources as they were given, where they were rewritten.
    """

    sources: tuple[SourceModel, ...]
    graphs: tuple[ModelGraph, ...]
    target: SourceModel
    target_graph: ModelGraph
    normal: NormalStates | None = None
    originals: tuple[SourceModel, ...] = ()

    def sizes(self, key: str) -> list[int]:
        """Returns the number of neurons of a group in every source, and in the target last."""
        return [graph.groups[key].size for graph in (*self.graphs, self.target_graph)]


def trace_all(sources: tuple[SourceModel, ...], target: int | nn.Module | SourceModel, tracer: Tracer) -> TracedModels:
    """Returns all sources and the target, each with its graph.

    Raises:
        RecipeError: The target is no source.
        GraphMismatchError: A source differs from the target by more than neuron counts.
        ArchitectureError: The target has a group without neurons.
    """
    graphs = tuple(tracer.graph_of(source) for source in sources)
    if isinstance(target, int):
        if not 0 <= target < len(sources):
            raise RecipeError(f"Target {target} is not one of the {len(sources)} models (counted from 0).")
        goal, goal_graph = sources[target], graphs[target]
    else:
        goal = SourceModel.of(target, "the target")
        goal_graph = tracer.graph_of(goal)
    goal_graph, *graphs = _all_pinned([goal_graph, *graphs])
    for source, graph in zip(sources, graphs, strict=True):
        goal_graph.check_same_structure(graph, goal.name, source.name)
    for key, group in goal_graph.groups.items():
        if group.size < 1:
            raise ArchitectureError(f"Group '{key}' of the target has no neurons. Give it at least one.")
    return TracedModels(sources, tuple(graphs), goal, goal_graph)


def _all_pinned(graphs: list[ModelGraph]) -> list[ModelGraph]:
    """Returns the graphs; what is refuted in one of them is pinned in all."""
    refuted = refuted_groups(graphs)
    for key, why in refuted.items():
        graphs = [pinned(graph, [key], why) if key in graph.free_groups else graph for graph in graphs]
    return graphs
