"""Tracing with the node rules and front ends that plugins registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mergekit_ot.graph.capture.capture import FrontEnds
from mergekit_ot.graph.capture.front_end import TraceLimits
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.trace import trace
from mergekit_ot.hooks.manager import PluginManager


def trace_with(
    manager: PluginManager,
    model: nn.Module,
    example_inputs: Tensor | tuple[object, ...],
    front_end: str,
    limits: TraceLimits | None,
) -> ModelGraph:
    """Returns the graph of a module, as `mergekit_ot.trace_model` does with one manager's plugins."""
    front_ends = {name: _maker(entry.load) for name, entry in manager.front_ends.items()}
    rules = {name: entry.load for name, entry in manager.node_rules.items()}
    return trace(model, example_inputs, rules, FrontEnds(front_ends, front_end), limits)


def _maker(load_kind: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    return lambda: load_kind()()
