"""From a module to its `ModelGraph`: capture, propagate, name the groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import networkx as nx
from torch import Tensor, nn
from torch.export import ExportedProgram

from mergekit_ot.graph.build import GraphBuilder
from mergekit_ot.graph.capture import capture
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.propagate import Propagator, is_mutating, reason_of
from mergekit_ot.graph.rule import NodeRule

if TYPE_CHECKING:
    from mergekit_ot.plugin_manager import PluginManager


def trace_model(
    model: nn.Module, example_inputs: Tensor | tuple[object, ...], manager: PluginManager | None = None
) -> ModelGraph:
    """Finds the neuron groups of a module.

    Args:
        model: Any ``nn.Module``; it is copied, put into evaluation mode and never run.
        example_inputs: A tensor or a tuple of positional inputs of the shapes that the model takes.
        manager: Whose node rules are used; the installed plugins by default.

    Returns:
        The graph IR of the model.

    Raises:
        ArchitectureError: The module cannot be traced at these inputs.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = trace_model(net, torch.randn(2, 4))
        >>> list(graph.free_groups)
        ['0.weight:0']
    """
    if manager is None:
        from mergekit_ot.plugin_manager import default_manager

        manager = default_manager()
    program = capture(model, example_inputs)
    aliases = tied_names(model)
    labelled = Propagator(program, rule_finder(manager), aliases).run()
    builder = GraphBuilder(labelled, aliases, hidden_state(model))
    return builder.build(operation_graph(program), program)


def rule_finder(manager: PluginManager) -> Callable[[Any], NodeRule | None]:
    """Returns what looks up the rule of an operation: its overload first, then its name, then its tags."""
    table: Mapping[str, Any] = manager.node_rules
    found: dict[str, NodeRule | None] = {}

    def find(target: Any) -> NodeRule | None:
        name = str(target)
        if name not in found:
            keys = [name, name.rsplit(".", 1)[0]] + [f"tag:{tag.name}" for tag in getattr(target, "tags", ())]
            if is_mutating(target):
                keys = keys[:1]
            found[name] = next((table[key].load() for key in keys if key in table), None)
        return found[name]

    return find


def tied_names(model: nn.Module) -> dict[str, str]:
    """Returns further name → first name for every parameter or buffer that a module holds under several names."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        # By identity, never by address: on the meta device every address is zero.
        if first.setdefault(id(tensor), name) != name:
            aliases[name] = first[id(tensor)]
    return aliases


def hidden_state(model: nn.Module) -> tuple[str, ...]:
    """Returns a sentence for each tensor that a module keeps outside its parameters and buffers."""
    found = []
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                where = f"{path}.{name}" if path else name
                found.append(
                    f"'{where}' is a tensor outside parameters and buffers: it is not in the state dict, "
                    "and a stale value would enter the trace. Register it as a buffer, or trace a fresh instance."
                )
    return tuple(found)


def operation_graph(program: ExportedProgram) -> nx.DiGraph:
    """Returns the operations, values and parameters of a captured program; an edge is a use."""
    graph = nx.DiGraph()
    for node in program.graph.nodes:
        reason = reason_of(node)
        graph.add_node(node.name, kind=node.op, operation=str(node.target), module_path=reason.module_path)
        for used in node.all_input_nodes:
            graph.add_edge(used.name, node.name)
    return graph
