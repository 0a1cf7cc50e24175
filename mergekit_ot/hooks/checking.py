"""Neuron groups are verified on fresh instances of a model, with the rules and symmetries that plugins registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mergekit_ot.graph.capture.copying import making_shaped
from mergekit_ot.graph.capture.front_end import AUTO, TraceLimits
from mergekit_ot.graph.capture.inputs import as_inputs, traced_inputs
from mergekit_ot.hooks.manager import PluginManager, default_manager
from mergekit_ot.hooks.symmetries import required_symmetries

if TYPE_CHECKING:
    from mergekit_ot.graph.symmetry.check import CheckReport


def check_model(
    make: Callable[[], nn.Module],
    example_inputs: Tensor | tuple[object, ...],
    *,
    manager: PluginManager | None = None,
    seed: int = 0,
    trials: int = 2,
    front_end: str = AUTO,
    limits: TraceLimits | None = None,
) -> CheckReport:
    """Verifies the neuron groups of a model on fresh instances and pins those that do not hold.

    Args:
        make: Gives a fresh instance each time; it must never have been run.
        example_inputs: Inputs of the shapes the model takes.
        manager: Whose node rules and symmetries are used; the installed plugins by default.
        seed: Seed of the random weights, inputs and orders.
        trials: Number of random orders of all groups.
        front_end: What captures the module: ``auto``, ``export`` or a registered one, such as ``make-fx``.
        limits: Time and size at which tracing is stopped.

    Raises:
        ArchitectureError: The model cannot be traced.
        PluginError: No plugin registers a symmetry, so that nothing could be proven.

    Example:
        >>> import torch
        >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> report = check_model(make, torch.randn(2, 4))
        >>> report.groups, report.certified, report.preserved
        (1, 1, True)
    """
    from mergekit_ot.graph.symmetry.check import check
    from mergekit_ot.hooks.tracing import trace_with

    make = making_shaped(make, as_inputs(example_inputs))
    model, manager = make(), manager or default_manager()
    symmetries = required_symmetries(manager)
    graph = trace_with(manager, model, example_inputs, front_end, limits)
    return check(make, graph, traced_inputs(model, example_inputs), symmetries, seed=seed, trials=trials)
