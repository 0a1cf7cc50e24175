"""From a module to its `ModelGraph`: capture, propagate, name the groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import networkx as nx
from torch import Tensor, nn

from mergekit_ot.errors import ArchitectureError
from mergekit_ot.graph.build import GraphBuilder
from mergekit_ot.graph.capture import AUTO, capture
from mergekit_ot.graph.front_end import TraceBudget, TraceLimits
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.program import CapturedProgram, reason_of
from mergekit_ot.graph.propagate import Labelled, Propagator
from mergekit_ot.graph.rule import NodeRule

if TYPE_CHECKING:
    from mergekit_ot.plugin_manager import PluginManager


def trace_model(
    model: nn.Module,
    example_inputs: Tensor | tuple[object, ...],
    manager: PluginManager | None = None,
    *,
    front_end: str = AUTO,
    limits: TraceLimits | None = None,
) -> ModelGraph:
    """Finds the neuron groups of a module.

    Args:
        model: Any ``nn.Module``; it is copied, put into evaluation mode and never run.
        example_inputs: A tensor or a tuple of positional inputs of the shapes that the model takes.
        manager: Whose node rules and front ends are used; the installed plugins by default.
        front_end: What captures the module: ``auto``, ``export`` or a registered one, such as ``make-fx``.
        limits: Time and size at which tracing is stopped.

    Returns:
        The graph IR of the model.

    Raises:
        ArchitectureError: The module cannot be traced at these inputs, or was run before and holds what that run left.
        TraceLimitError: A limit is passed.

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
    budget = TraceBudget(limits or TraceLimits(), type(model).__name__)
    program = capture(model, example_inputs, manager, front_end, budget)
    aliases = tied_names(model)
    labelled = Propagator(program, rule_finder(manager), aliases, budget).run()
    hidden = hidden_tensors(model)
    refuse_stale(model, hidden, labelled)
    builder = GraphBuilder(labelled, aliases, hidden_sentences(hidden), program.remarks)
    return builder.build(operation_graph(program), program)


def rule_finder(manager: PluginManager) -> Callable[[Any], NodeRule | None]:
    """Returns what looks up a rule: of an operation by overload, name and tags, of ``module:NAME`` as it is."""
    table: Mapping[str, Any] = manager.node_rules
    found: dict[str, NodeRule | None] = {}

    def find(target: Any) -> NodeRule | None:
        name = str(target)
        if name not in found:
            keys = [name, name.rsplit(".", 1)[0]] if not name.startswith("module:") else [name]
            keys += [f"tag:{tag.name}" for tag in getattr(target, "tags", ())]
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


def hidden_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors that a module keeps outside its parameters and buffers, also in lists and mappings."""
    found = {}
    # nn.LSTM keeps its parameters in a list besides; those are no hidden state.
    registered = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if not name.startswith(("_parameters", "_buffers", "_modules")):
                for inner, tensor in _tensors_in(value, name):
                    if id(tensor) not in registered:
                        found[f"{path}.{inner}" if path else inner] = tensor
    return found


def _tensors_in(value: object, name: str) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(name, value)]
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    return [
        found for key, item in items if not isinstance(item, nn.Module) for found in _tensors_in(item, f"{name}.{key}")
    ]


def hidden_sentences(hidden: Iterable[str]) -> tuple[str, ...]:
    """Returns a sentence for each tensor outside parameters and buffers."""
    return tuple(
        f"'{where}' is a tensor outside parameters and buffers: it is not in the state dict, "
        "and a stale value would enter the trace. Register it as a buffer, or trace a fresh instance."
        for where in hidden
    )


def refuse_stale(model: nn.Module, hidden: Mapping[str, Tensor], labelled: Labelled) -> None:
    """Refuses a module that was run before, and whose forward reads what that run left in place of a parameter.

    The sign of it: a module reads a tensor that it keeps outside its state, and has a parameter that the trace never
    reads. The graph would be that of another function than the state dict's.

    Raises:
        ArchitectureError: Names the tensor and the parameter.
    """
    read = set(labelled.constants.values())
    for where in hidden:
        owner = _owner(model, where)
        if owner not in read:
            continue
        prefix = f"{owner}." if owner else ""
        own = [name for name, _ in model.named_parameters() if name.startswith(prefix)]
        unused = [name for name in own if name not in labelled.first_use]
        if unused:
            raise ArchitectureError(
                f"'{where}' holds a tensor that an earlier forward left in the module, and forward reads it where "
                f"'{unused[0]}' belongs, which the trace never reads. The graph would be that of a stale function. "
                "Pass a fresh instance that was never run: in Python SourceModel(name, make, state), or a function "
                "that builds the module."
            )


def _owner(model: nn.Module, where: str) -> str:
    paths = [path for path, _ in model.named_modules() if path == "" or where.startswith(f"{path}.")]
    return max(paths, key=len)


def operation_graph(program: CapturedProgram) -> nx.DiGraph:
    """Returns the operations, values and parameters of a captured program; an edge is a use."""
    graph = nx.DiGraph()
    for node in program.graph.nodes:
        reason = reason_of(node)
        graph.add_node(node.name, kind=node.op, operation=str(node.target), module_path=reason.module_path)
        for used in node.all_input_nodes:
            graph.add_edge(used.name, node.name)
    return graph
