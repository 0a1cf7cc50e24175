"""A step of a fusion as data: what it needs, what it found, and the pure function that leads from one to the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from mergekit_ot.errors import PluginError, blaming, origin_of
from mergekit_ot.fusion.alignment import Alignment, are_same
from mergekit_ot.fusion.families import GroupCouplings, couple_nested, has_open_families, kept_up
from mergekit_ot.fusion.group_view import GroupView
from mergekit_ot.fusion.moving import fused_shape
from mergekit_ot.fusion.node_measure import AbstractNodeMeasure
from mergekit_ot.fusion.responses import GroupResponses
from mergekit_ot.fusion.step_report import GroupReport
from mergekit_ot.fusion.tensors import Spread, spread_of
from mergekit_ot.fusion.weight_rows import KeptProducts
from mergekit_ot.threads import threads_for
from mergekit_ot.transport.coupling import Coupling
from mergekit_ot.transport.measure import NeuronMeasure, flaw_of
from mergekit_ot.transport.problem import BarycenterProblem, Status
from mergekit_ot.transport.solver import AbstractBarycenterSolver, Scope

# Who couples what no solver is asked for.
NESTED = "nested assignment"
NOBODY = "nobody"


class StepTensors:
    """The sources' parameters that one step reads: read when they are asked for, and sent along when it is pickled.

    Args:
        read: Gives a parameter of a source: ``read(source, name)``.
        sources: Number of sources.
        names: The parameters.
    """

    def __init__(self, read: Callable[[int, str], Tensor], sources: int, names: Sequence[str]) -> None:
        self._read, self._sources, self.names = read, sources, tuple(names)

    def read(self, source: int, name: str) -> Tensor:
        """Returns a parameter of a source."""
        return self._read(source, name)

    def __reduce__(self) -> tuple[Any, ...]:
        keys = [(source, name) for source in range(self._sources) for name in self.names]
        return _sent, ({key: self._read(*key) for key in keys}, self._sources, self.names)


def _sent(values: Mapping[tuple[int, str], Tensor], sources: int, names: Sequence[str]) -> StepTensors:
    return StepTensors(lambda source, name: values[source, name], sources, names)


@dataclass(frozen=True)
class StepTask:
    """What one step needs, as data: it can be run here, in another thread, or pickled and run in another process.

    Attributes:
        number: Number of the step in its plan.
        groups: The groups it solves, in order: one, followed by the families indexed by it.
        scope: Which tensors describe a neuron in this sweep.
        solver: Couples the neurons.
        measure: Says what a neuron is seen by.
        alignment: The couplings in force, over graphs without their programs.
        tensors: The parameters it reads.
        responses: What is known of the neurons' responses to calibration data; None where they are not asked for.
        model_weights: One per source.
        seed: Seed of every random choice.
        threads: Threads to use; None for as many as the step is worth.
        kept: Products of weights that the last visit of the step left.
        known: The solution, where the step was solved before from the very same couplings.

    Example:
        >>> import torch
        >>> from mergekit_ot import AbstractExecutor, fuse, run_task
        >>> class Printing(AbstractExecutor):
        ...     def run(self, queue):
        ...         while (task := queue.take()) is not None:
        ...             print(task.number, task.groups)
        ...             queue.give(run_task(task))
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> result = fuse([net, net], example_inputs=torch.randn(2, 4), executor=Printing())
        0 ('0.weight:0',)
    """

    number: int
    groups: tuple[str, ...]
    scope: Scope
    solver: AbstractBarycenterSolver
    measure: AbstractNodeMeasure
    alignment: Alignment
    tensors: StepTensors
    responses: GroupResponses | None
    model_weights: tuple[float, ...]
    seed: int
    threads: int | None = None
    kept: KeptProducts = field(default_factory=KeptProducts)
    known: StepSolution | None = None


@dataclass(frozen=True)
class StepSolution:
    """What a step found.

    Attributes:
        number: Number of the step in its plan.
        couplings: Group → one coupling (or family of couplings) per source; empty where neurons keep their places.
        reports: One per group, in the order of the task.
        kept: Products of weights for the next visit of the step.

    Example:
        >>> StepSolution(3, {}, ()).number
        3
    """

    number: int
    couplings: Mapping[str, GroupCouplings]
    reports: tuple[GroupReport, ...]
    kept: KeptProducts = field(default_factory=KeptProducts)


def run_task(task: StepTask) -> StepSolution:
    """Returns what a step finds: a function of the task alone, the same in every process.

    Raises:
        SolverError: The solver cannot treat the problem, or broke its contract.

    Example:
        >>> import pickle, torch
        >>> from mergekit_ot import AbstractExecutor, fuse
        >>> class Sending(AbstractExecutor):
        ...     def run(self, queue):
        ...         while (task := queue.take()) is not None:
        ...             queue.give(run_task(pickle.loads(pickle.dumps(task))))
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> fuse([net, net], example_inputs=torch.randn(2, 4), executor=Sending()).groups[0].solver
        'wb'
    """
    if task.known is not None:
        return task.known
    # A task stays what it is, however often it is run.
    task = replace(task, kept=task.kept.copy())
    with threads_for(_multiplications(task), task.threads):
        return _found(task)


def _multiplications(task: StepTask) -> float:
    """Returns how many multiplications comparing all neurons of the largest group once takes, or a little more."""
    fused = task.alignment.target
    sizes = [fused.groups[key].size for key in task.groups]
    numbers = sum(math.prod(fused_shape(fused, name)) for name in task.tensors.names)
    return float(max(sizes, default=0)) * numbers


def _found(task: StepTask) -> StepSolution:
    if task.solver.max_sweeps == 0:
        sizes = [task.alignment.target.groups[key].size for key in task.groups]
        stay = [
            GroupReport(key, size, None, Status.CONVERGED, NOBODY) for key, size in zip(task.groups, sizes, strict=True)
        ]
        return StepSolution(task.number, {}, tuple(stay))
    nested = any(_is_nested(_view(task, key, task.alignment)) for key in task.groups)
    if nested and all(key in task.alignment.couplings for key in task.groups):
        return _improved(task)
    alignment, reports = task.alignment, []
    for key in task.groups:
        alignment, report = _solved(task, key, alignment)
        reports.append(report)
    return _solution(task, alignment, reports)


def _improved(task: StepTask) -> StepSolution:
    """Solves groups with families for which couplings are in force, and keeps only what leaves less apart.

    An outer group is judged with the couplings found inside it. Where it gains nothing, the families may.
    """
    alignment, reports = task.alignment, []
    least: Spread | None = None
    is_known = False
    for key in task.groups:
        found, report = _solved(task, key, alignment)
        reports.append(report)
        if _couple_alike(found, alignment):
            continue
        if not is_known:
            least, is_known = _spread(task, alignment), True
        spread = _spread(task, found)
        if least is None or spread is None or spread.is_below(least):
            alignment, least = found, spread
    return _solution(task, alignment, reports)


def _couple_alike(one: Alignment, other: Alignment) -> bool:
    """Whether two alignments couple all groups in the same way."""
    return all(are_same(other.couplings[key], found) for key, found in one.couplings.items())


def _spread(task: StepTask, alignment: Alignment) -> Spread | None:
    """Returns what couplings leave apart in the parameters of the step."""
    tensors = task.tensors
    weights, alpha = task.model_weights, task.solver.structure_weight
    return spread_of(tensors, alignment, weights, alpha, tensors.names, task.kept.squares)


def _solution(task: StepTask, alignment: Alignment, reports: Sequence[GroupReport]) -> StepSolution:
    before = task.alignment.couplings
    changed = {key: found for key, found in alignment.couplings.items() if before.get(key) is not found}
    return StepSolution(task.number, changed, tuple(reports), task.kept)


def _view(task: StepTask, key: str, alignment: Alignment) -> GroupView:
    return GroupView(
        group=key,
        alignment=alignment,
        scope=task.scope,
        read=task.tensors.read,
        wants_structure=task.solver.wants_structure,
        responses=None if task.responses is None else task.responses.rows,
        members=task.solver.members,
        kept=task.kept,
    )


def _is_nested(view: GroupView) -> bool:
    return bool(view.alignment.target.groups[view.group].context) or has_open_families(view)


def _solved(task: StepTask, key: str, alignment: Alignment) -> tuple[Alignment, GroupReport]:
    """Returns the alignment with a group solved, and its families kept up with it."""
    group, solver, view = alignment.target.groups[key], task.solver, _view(task, key, alignment)
    if _is_nested(view):
        found, cost = couple_nested(view, task.model_weights)
        alignment = alignment.with_couplings(found)
        report = GroupReport(key, group.size, cost, Status.CONVERGED, NESTED)
    else:
        measures = _measured(task, view, key)
        initial = _plain(alignment.couplings.get(key))
        problem = BarycenterProblem(measures, task.model_weights, group.size, initial, task.seed, key)
        solution = solver.solve(problem)
        alignment = alignment.with_couplings({key: solution.couplings})
        report = GroupReport(key, group.size, solution.cost, solution.status, solver.name)
    return alignment.with_couplings(kept_up(alignment, key)), report


def _measured(task: StepTask, view: GroupView, key: str) -> tuple[NeuronMeasure, ...]:
    """Returns what the node measure says of a group, where it is what measures say.

    Raises:
        PluginError: The measure raises, or returns anything else than one measure per source on common columns.
    """
    who = f"Measure '{type(task.measure).__name__}' on group '{key}'"
    with blaming(task.measure, who):
        measures = tuple(task.measure.measure(view))
        flaws = [flaw_of(measure) for measure in measures]
    flaw = next((flaw for flaw in flaws if flaw), "")
    columns = {(measure.columns,) for measure in measures} if not flaw else set()
    if len(measures) != view.count or len(columns) > 1:
        flaw = f"it gave {len(measures)} measures for {view.count} sources, with columns {sorted(columns)}"
    if flaw:
        raise PluginError(
            f"{who} (of {origin_of(task.measure)}) returned what is no measure: {flaw}. Check it with "
            "mergekit_ot.testing.check_measure, or leave its plugin out with MERGEOT_PLUGINS."
        )
    return measures


def _plain(couplings: GroupCouplings | None) -> tuple[Coupling, ...] | None:
    """Returns the couplings in force of a group that is no family."""
    if couplings is None:
        return None
    return tuple(coupling for coupling in couplings if isinstance(coupling, Coupling))
