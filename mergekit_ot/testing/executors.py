"""The contract of executors: every step is run once, in an order that the queue allows, and nothing else changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mergekit_ot.api import fuse
from mergekit_ot.fusion.executor import AbstractExecutor, TaskQueue
from mergekit_ot.fusion.result import FusionResult
from mergekit_ot.fusion.task import run_task
from mergekit_ot.hooks.manager import PluginManager

_WIDTH = 6


class _Branches(nn.Module):
    """Two branches that do not touch each other, so that their steps may run at the same time, and a third behind."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, _WIDTH), nn.Linear(4, _WIDTH)
        self.behind = nn.Linear(2 * _WIDTH, _WIDTH)
        self.head = nn.Linear(_WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.left(x).relu(), self.right(x).relu()], 1)
        return self.head(self.behind(both).relu())


class _InTurn(AbstractExecutor):
    def run(self, queue: TaskQueue) -> None:
        while (task := queue.take()) is not None:
            queue.give(run_task(task))


def check_executor(executor: AbstractExecutor, manager: PluginManager | None = None) -> None:
    """Checks that an executor does what running one step after the other does, to the bit.

    Args:
        executor: An instance; it runs several fusions, of one and of several sweeps.
        manager: The plugins to use; the installed ones by default.

    Raises:
        AssertionError: The clause that is broken.
        SolverError: The executor left a step over, or gave one back twice.

    Example:
        >>> from mergekit_ot import AbstractExecutor, run_task
        >>> class Serial(AbstractExecutor):
        ...     def run(self, queue):
        ...         while (task := queue.take()) is not None:
        ...             queue.give(run_task(task))
        >>> check_executor(Serial())
    """
    models = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            models.append(_Branches())
    states = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    for solver in ("wb", "weight-matching"):
        wanted = _fused(models, solver, _InTurn(), manager)
        given = _fused(models, solver, executor, manager)
        _compare(wanted, given, f"with solver '{solver}'")
    for model, state in zip(models, states, strict=True):
        for name, value in model.state_dict().items():
            if not torch.equal(value, state[name]):
                raise AssertionError(f"inputs untouched: '{name}' of a source changed while the executor ran")


def _fused(
    models: list[nn.Module], solver: str, executor: AbstractExecutor, manager: PluginManager | None
) -> FusionResult:
    inputs = torch.zeros(2, 4)
    return fuse(models, solver=solver, executor=executor, example_inputs=inputs, manager=manager, device="cpu")


def _compare(wanted: FusionResult, given: FusionResult, where: str) -> None:
    groups = {report.name: (report.cost, report.status) for report in given.groups}
    if groups != {report.name: (report.cost, report.status) for report in wanted.groups}:
        raise AssertionError(
            f"same reports: the groups' costs or statuses differ from those of one step at a time {where}"
        )
    for name, value in wanted.state.items():
        if not torch.equal(given.state[name], value):
            raise AssertionError(f"same bytes: '{name}' differs from the result of one step at a time {where}")
