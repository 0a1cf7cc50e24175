"""What observers are told after a step, and how the fusion of a group ended."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_ot.transport.problem import Status


@dataclass(frozen=True)
class GroupReport:
    """How the fusion of one group ended.

    Attributes:
        name: Key of the group.
        size: Neurons of the fused group.
        cost: The objective at the end, where there is one.
        status: How the solver ended.
        solver: Who coupled it: the solver, the nested assignment of heads and channels, or nobody.
    """

    name: str
    size: int
    cost: float | None
    status: Status
    solver: str


@dataclass(frozen=True)
class StepReport:
    """What observers are told after a step: its place, the sweep, and the groups it solved.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from types import SimpleNamespace
        >>> from mergekit_ot import PluginManager, fuse, hookimpl
        >>> reports, manager = [], PluginManager.load()
        >>> hook = hookimpl(lambda report: reports.append(report))
        >>> manager.register(SimpleNamespace(mergeot_step_done=hook), "watching")
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> result = fuse([net, net], solver="wb", example_inputs=torch.randn(2, 4), manager=manager)
        >>> [(report.number, report.total, report.groups[0].name, report.groups[0].size) for report in reports]
        [(0, 2, '0.weight:0', 8), (1, 2, '2.weight:0', 6)]
    """

    number: int
    total: int
    sweep: int
    groups: tuple[GroupReport, ...]
