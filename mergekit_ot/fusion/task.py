"""A step of a fusion as data: what it needs, what it found, and the pure function that leads from one to the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mergekit_ot.errors import PluginError, blaming, origin_of
from mergekit_ot.fusion.alignment import Alignment, FamilyCoupling
from mergekit_ot.fusion.families import couple_family, couple_outer, has_open_families, kept_up
from mergekit_ot.fusion.group_view import GroupView
from mergekit_ot.fusion.node_measure import AbstractNodeMeasure
from mergekit_ot.fusion.responses import GroupResponses
from mergekit_ot.fusion.step_report import GroupReport
from mergekit_ot.transport.coupling import Coupling
from mergekit_ot.transport.measure import NeuronMeasure, flaw_of
from mergekit_ot.transport.problem import BarycenterProblem, Status
from mergekit_ot.transport.solver import AbstractBarycenterSolver, Scope

# Who couples what no solver is asked for.
NESTED = "nested assignment"
NOBODY = "nobody"

GroupCouplings = tuple[Coupling | FamilyCoupling, ...]


class StepTensors:
    """The sources' parameters that one step reads: read when they are asked for, and sent along when it is pickled.

    Args:
        read: Gives a parameter of a source: ``read(source, name)``.
        sources: Number of sources.
        names: The parameters.
    """

    def __init__(self, read: Callable[[int, str], Tensor], sources: int, names: Sequence[str]) -> None:
        self._read, self._sources, self._names = read, sources, tuple(names)

    def read(self, source: int, name: str) -> Tensor:
        """Returns a parameter of a source."""
        return self._read(source, name)

    def __reduce__(self) -> tuple[Any, ...]:
        keys = [(source, name) for source in range(self._sources) for name in self._names]
        return _sent, ({key: self._read(*key) for key in keys}, self._sources, self._names)


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


@dataclass(frozen=True)
class StepSolution:
    """What a step found.

    Attributes:
        number: Number of the step in its plan.
        couplings: Group → one coupling (or family of couplings) per source; empty where neurons keep their places.
        reports: One per group, in the order of the task.

    Example:
        >>> StepSolution(3, {}, ()).number
        3
    """

    number: int
    couplings: Mapping[str, GroupCouplings]
    reports: tuple[GroupReport, ...]


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
    alignment, couplings, reports = task.alignment, {}, []
    for key in task.groups:
        size = alignment.target.groups[key].size
        if task.solver.max_sweeps == 0:
            reports.append(GroupReport(key, size, None, Status.CONVERGED, NOBODY))
            continue
        couplings[key], report = _solved(task, key, alignment)
        alignment = alignment.with_couplings({key: couplings[key]})
        families = kept_up(alignment, key)
        couplings.update(families)
        alignment = alignment.with_couplings(families)
        reports.append(report)
    return StepSolution(task.number, couplings, tuple(reports))


def _solved(task: StepTask, key: str, alignment: Alignment) -> tuple[GroupCouplings, GroupReport]:
    group, solver = alignment.target.groups[key], task.solver
    view = GroupView(
        group=key,
        alignment=alignment,
        scope=task.scope,
        read=task.tensors.read,
        wants_structure=solver.wants_structure,
        responses=None if task.responses is None else task.responses.rows,
        members=solver.members,
    )
    if group.context or has_open_families(view):
        couple = couple_family if group.context else couple_outer
        couplings, cost = couple(view, task.model_weights)
        return tuple(couplings), GroupReport(key, group.size, cost, Status.CONVERGED, NESTED)
    measures = _measured(task, view, key)
    initial = _plain(alignment.couplings.get(key))
    problem = BarycenterProblem(measures, task.model_weights, group.size, initial, task.seed, key)
    solution = solver.solve(problem)
    return solution.couplings, GroupReport(key, group.size, solution.cost, solution.status, solver.name)


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
    columns = {tuple(measure.support.shape[1:]) for measure in measures} if not flaw else set()
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
