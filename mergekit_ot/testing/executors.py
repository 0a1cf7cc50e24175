"""The contract of executors: every step is run once, in an order that the queue allows, and nothing else changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mergekit_ot.api import fuse
from mergekit_ot.fusion.executor import AbstractExecutor, TaskQueue
from mergekit_ot.fusion.result import FusionResult
from mergekit_ot.fusion.task import run_task
from mergekit_ot.hooks.manager import PluginManager
from mergekit_ot.testing.clauses import Contract

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

    The clauses: the same reports and the same bytes as one step at a time; the sources stay untouched.

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
    advice = "Correct the executor; the clauses are listed in mergekit_ot.testing.check_executor."
    contract = Contract(f"The executor '{type(executor).__name__}'", advice, AssertionError)
    for solver in ("wb", "weight-matching"):
        wanted = _fused(models, solver, _InTurn(), manager)
        given = _fused(models, solver, executor, manager)
        for clause in (_reports_are_the_same, _bytes_are_the_same):
            contract.check(clause, wanted, given, where=f", with solver '{solver}'")
    contract.check(_sources_stay_untouched, models, states)


def _fused(
    models: list[nn.Module], solver: str, executor: AbstractExecutor, manager: PluginManager | None
) -> FusionResult:
    inputs = torch.zeros(2, 4)
    return fuse(models, solver=solver, executor=executor, example_inputs=inputs, manager=manager, device="cpu")


def _reports_are_the_same(wanted: FusionResult, given: FusionResult) -> str:
    """The fusion gives the same reports as one step at a time."""
    groups = {report.name: (report.cost, report.status) for report in given.groups}
    is_same = groups == {report.name: (report.cost, report.status) for report in wanted.groups}
    return "" if is_same else "the costs or the statuses of groups differ"


def _bytes_are_the_same(wanted: FusionResult, given: FusionResult) -> str:
    """The fusion gives the same bytes as one step at a time."""
    return _first_change(wanted.state, given.state)


def _sources_stay_untouched(models: Sequence[nn.Module], states: Sequence[Mapping[str, Tensor]]) -> str:
    """The sources stay untouched while the executor runs."""
    changes = [_first_change(state, model.state_dict()) for model, state in zip(models, states, strict=True)]
    return next(filter(None, changes), "")


def _first_change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> str:
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    return f"'{changed[0]}' differs" if changed else ""
