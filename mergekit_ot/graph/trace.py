"""From a module to its `ModelGraph`: capture, propagate, name the groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergekit_ot.errors import ArchitectureError
from mergekit_ot.graph.build import GraphBuilder
from mergekit_ot.graph.capture.branches import branch_sentences, stored_by_forward
from mergekit_ot.graph.capture.capture import FrontEnds, capture
from mergekit_ot.graph.capture.copying import with_shapes
from mergekit_ot.graph.capture.front_end import TraceBudget, TraceLimits
from mergekit_ot.graph.capture.inputs import as_inputs
from mergekit_ot.graph.capture.module_state import hidden_sentences, hidden_tensors, tied_names
from mergekit_ot.graph.capture.program import CapturedProgram, reason_of
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.propagate import Labelled, Propagator
from mergekit_ot.graph.rules.rule import NodeRule

if TYPE_CHECKING:
    import networkx as nx

# Operation (``aten.linear``) or module (``module:Experts``) → what gives its rule, loaded when it is first asked for.
RuleTable = Mapping[str, Callable[[], NodeRule]]


def trace(
    model: nn.Module,
    example_inputs: Tensor | tuple[object, ...],
    rules: RuleTable,
    front_ends: FrontEnds | None = None,
    limits: TraceLimits | None = None,
) -> ModelGraph:
    """Finds the neuron groups of a module: what `mergekit_ot.trace_model` does, of rules and front ends that are given.

    Args:
        model: Any module; it is copied, and never run.
        example_inputs: Inputs of the shapes that it takes.
        rules: The rules of operations and modules.
        front_ends: What captures the module; ``export`` alone where left out.
        limits: Time and size at which tracing is stopped; the default ones where left out.

    Raises:
        ArchitectureError: The module cannot be traced at these inputs, or was run before and holds what that run left.
        TraceLimitError: A limit is passed.
    """
    budget = TraceBudget(limits or TraceLimits(), type(model).__name__)
    model = with_shapes(model, as_inputs(example_inputs))
    program = capture(model, example_inputs, front_ends, budget)
    aliases = tied_names(model)
    labelled = Propagator(program, rule_finder(rules), aliases, budget).run()
    hidden = hidden_tensors(model)
    left = _maybe_left(model, hidden)
    refuse_stale(model, left, labelled)
    refuse_unread(model, labelled)
    remarks = (*program.remarks, *branch_sentences(program.branches))
    builder = GraphBuilder(labelled, aliases, hidden_sentences(hidden, left), remarks)
    return builder.build(operation_graph(program), program)


def rule_finder(rules: RuleTable) -> Callable[[Any], NodeRule | None]:
    """Returns what looks up a rule: of an operation by overload, name and tags, of ``module:NAME`` as it is."""
    known: dict[str, NodeRule | None] = {}

    def find(target: Any) -> NodeRule | None:
        name = str(target)
        if name not in known:
            keys = [name, name.rsplit(".", 1)[0]] if not name.startswith("module:") else [name]
            keys += [f"tag:{tag.name}" for tag in target.tags] if isinstance(target, torch._ops.OpOverload) else []
            known[name] = next((rules[key]() for key in keys if key in rules), None)
        return known[name]

    return find


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


def refuse_unread(model: nn.Module, labelled: Labelled) -> None:
    """Refuses a module whose output depends on none of its parameters.

    Raises:
        ArchitectureError: Says so.
    """
    names = [name for name, _ in model.named_parameters()]
    if names and not labelled.first_use:
        raise ArchitectureError(
            f"The output of '{type(model).__name__}' depends on none of its {len(names)} parameters (the first is "
            f"'{names[0]}'), so nothing can be aligned. In evaluation mode, forward must return what it "
            "computes with them."
        )


def _maybe_left(model: nn.Module, hidden: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors outside a module's state that a forward may have left there, not the constructor."""
    stored = stored_by_forward(model) if hidden else frozenset[str]()
    return {
        where: tensor
        for where, tensor in hidden.items()
        if stored is None or where[len(_owner(model, where)) :].lstrip(".").split(".")[0] in stored
    }


def _owner(model: nn.Module, where: str) -> str:
    paths = [path for path, _ in model.named_modules() if path == "" or where.startswith(f"{path}.")]
    return max(paths, key=len)


def operation_graph(program: CapturedProgram) -> nx.DiGraph:
    """Returns the operations, values and parameters of a captured program; an edge is a use."""
    import networkx as nx

    graph = nx.DiGraph()
    for node in program.graph.nodes:
        reason = reason_of(node)
        graph.add_node(node.name, kind=node.op, operation=str(node.target), module_path=reason.module_path)
        for used in node.all_input_nodes:
            graph.add_edge(used.name, node.name)
    return graph
