"""The graphs of a fusion: each architecture is traced once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from mergekit_ot.errors import ArchitectureError, RecipeError
from mergekit_ot.fusion.growth.record import Growth
from mergekit_ot.fusion.heads import check_heads, head_parameters, with_all_heads
from mergekit_ot.fusion.layer_rules import LayerRules
from mergekit_ot.fusion.normal_states import NormalStates
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.fusion.trace_memory import TraceMemory
from mergekit_ot.graph.capture.description import ModuleDescription, described_module
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.mismatch import first_difference
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
        rules: What holds for single parameters, by the names that describe them.
        uncompared: Parameters that are never compared: heads of all sources, and what is kept and differs in size.
        heads: Parameter that makes outputs → the axis along which those of all sources stand beside each other; empty
            where the fused model has one head.
        growth: What of the target became wider than it is in any source; None where nothing did.
    """

    sources: tuple[SourceModel, ...]
    graphs: tuple[ModelGraph, ...]
    target: SourceModel
    target_graph: ModelGraph
    normal: NormalStates | None = None
    originals: tuple[SourceModel, ...] = ()
    rules: LayerRules = field(default_factory=LayerRules)
    uncompared: frozenset[str] = frozenset()
    heads: Mapping[str, int] = field(default_factory=dict)
    growth: Growth | None = None

    @property
    def is_changed(self) -> bool:
        """Whether the fused model has sizes that no source and no given target has."""
        return bool(self.heads) or self.growth is not None

    def sizes(self, key: str) -> list[int]:
        """Returns the number of neurons of a group in every source, and in the target last."""
        return [graph.groups[key].size for graph in (*self.graphs, self.target_graph)]


def trace_all(
    sources: tuple[SourceModel, ...],
    target: int | nn.Module | SourceModel,
    tracer: Tracer,
    rules: LayerRules | None = None,
) -> TracedModels:
    """Returns all sources and the target, each with its graph.

    Args:
        sources: In the user's order.
        target: Whose sizes the fused model takes.
        tracer: Gives the graphs.
        rules: What holds for single parameters.

    Raises:
        RecipeError: The target is no source; or what is kept from a source has other sizes than the target.
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
    rules = (rules or LayerRules()).described(goal_graph.aliases)
    heads = head_parameters(goal_graph) if rules.has_all_heads else {}
    if heads and isinstance(target, int):
        goal = with_all_heads(goal, graphs, heads)
        goal_graph, *_ = _all_pinned([tracer.graph_of(goal), *graphs])
    for source, graph in zip(sources, graphs, strict=True):
        goal_graph.check_same_structure(graph, goal.name, source.name, {*rules.kept, *heads})
    for key, group in goal_graph.groups.items():
        if group.size < 1:
            raise ArchitectureError(f"Group '{key}' of the target has no neurons. Give it at least one.")
    models = TracedModels(sources, tuple(graphs), goal, goal_graph)
    return with_rules(models, rules, heads) if rules else models


def with_rules(models: TracedModels, rules: LayerRules, heads: Mapping[str, int]) -> TracedModels:
    """Returns networks with rules for single parameters.

    Args:
        models: The networks.
        rules: By the names that describe parameters.
        heads: The parameters of which all sources' are taken, and along which axis.

    Raises:
        RecipeError: What is kept from a source has other sizes than the target, or heads do not fit into it.
    """
    goal = models.target_graph
    check_heads(goal, models.graphs, heads)
    differing = set(heads)
    for name, number in rules.kept.items():
        if name in heads:
            raise RecipeError(f"'{name}' is to be kept from one model, and --head both takes those of all. Drop one.")
        graphs = models.graphs if name in goal.layouts else ()
        differs = [first_difference(goal, graph, name) is not None for graph in graphs]
        differing |= {name} if any(differs) else set()
        if differs and differs[number]:
            source, shapes = models.sources[number], models.target.architecture.shapes
            raise RecipeError(
                f"'{name}' is kept from '{source.name}', where it has shape {tuple(source.state.shape(name))}; the "
                f"fused model takes the sizes of '{models.target.name}', where it has {tuple(shapes[name].shape)}. "
                f"Take the sizes of the model that it is kept from: --target {number}."
            )
    return replace(models, rules=rules, uncompared=frozenset(differing), heads=heads)


def _all_pinned(graphs: list[ModelGraph]) -> list[ModelGraph]:
    """Returns the graphs; what is refuted in one of them is pinned in all."""
    refuted = refuted_groups(graphs)
    for key, why in refuted.items():
        graphs = [pinned(graph, [key], why) if key in graph.free_groups else graph for graph in graphs]
    return graphs
