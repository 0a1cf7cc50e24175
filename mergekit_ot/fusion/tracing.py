"""The graphs of a fusion: each architecture is traced once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from mergekit_ot.errors import ArchitectureError, RecipeError
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.graph.ir import ModelGraph

# Lists of weights and of their names that recurrent modules keep beside their parameters.
_DERIVED = frozenset({"_all_weights", "_flat_weights", "_flat_weights_names", "_flat_weight_refs"})


def is_same_architecture(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules differ in the values of their tensors at most, so that one trace serves both."""
    ours, theirs = dict(one.named_modules()), dict(other.named_modules())
    if ours.keys() != theirs.keys():
        return False
    tensors = [*one.named_parameters(), *one.named_buffers()]
    others = dict([*other.named_parameters(), *other.named_buffers()])
    if {n: (t.shape, t.dtype) for n, t in tensors} != {n: (t.shape, t.dtype) for n, t in others.items()}:
        return False
    # What stands in no file may decide what is free, so it must be the same.
    saved = one.state_dict().keys()
    unsaved = {name: tensor for name, tensor in one.named_buffers() if name not in saved}
    if not all(_is_same_tensor(tensor, others[name]) for name, tensor in unsaved.items()):
        return False
    return all(
        type(ours[path]) is type(theirs[path]) and _settings(ours[path]) == _settings(theirs[path]) for path in ours
    )


def _is_same_tensor(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.is_meta or other.is_meta or torch.equal(one, other)


def _settings(module: nn.Module) -> dict[str, object]:
    """What a module is set to, apart from its tensors; anything that is no plain value counts by identity."""
    plain = (bool, int, float, complex, str, bytes, tuple, type(None), torch.dtype, torch.device)
    return {
        name: value if isinstance(value, plain) else id(value)
        for name, value in vars(module).items()
        if name not in nn.Module().__dict__ and name not in _DERIVED and not isinstance(value, nn.Module)
    }


class Tracer:
    """Traces each architecture once, however many sources share it.

    Args:
        trace: Gives the graph of a fresh module.
    """

    def __init__(self, trace: Callable[[nn.Module], ModelGraph]) -> None:
        self.trace = trace
        self.traced: list[tuple[SourceModel, nn.Module, ModelGraph]] = []

    def graph_of(self, source: SourceModel) -> ModelGraph:
        """Returns the graph of a source."""
        model = None
        for other, instance, graph in self.traced:
            if other.make is source.make:
                return graph
            model = source.make() if model is None else model
            if is_same_architecture(model, instance):
                return graph
        model = source.make() if model is None else model
        graph = self.trace(model)
        self.traced.append((source, model, graph))
        return graph


@dataclass(frozen=True)
class TracedModels:
    """The networks of a fusion with their graphs, which differ by the sizes of groups at most.

    Attributes:
        sources: In the user's order.
        graphs: One per source.
        target: The architecture whose sizes the fused model takes.
        target_graph: Its graph.
    """

    sources: tuple[SourceModel, ...]
    graphs: tuple[ModelGraph, ...]
    target: SourceModel
    target_graph: ModelGraph

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
    for source, graph in zip(sources, graphs, strict=True):
        goal_graph.check_same_structure(graph, goal.name, source.name)
    for key, group in goal_graph.groups.items():
        if group.size < 1:
            raise ArchitectureError(f"Group '{key}' of the target has no neurons. Give it at least one.")
    return TracedModels(sources, graphs, goal, goal_graph)
