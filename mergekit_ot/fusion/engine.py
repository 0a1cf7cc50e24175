"""The engine: runs a plan step by step and puts the fused model together."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergekit_ot.errors import SolverError
from mergekit_ot.fusion.alignment import Alignment, FamilyCoupling, transport_parameter
from mergekit_ot.fusion.measures import GroupView
from mergekit_ot.fusion.nested import couple_family, couple_outer, has_open_families, identity_family
from mergekit_ot.fusion.plan import Step, build_plan
from mergekit_ot.fusion.repair import RepairContext
from mergekit_ot.fusion.responses import ResponseGrams
from mergekit_ot.fusion.result import FusionResult, GroupReport, StepReport, aligned_state
from mergekit_ot.fusion.setup import FusionSetup, prepare
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.graph.capture import AUTO
from mergekit_ot.graph.front_end import TraceLimits
from mergekit_ot.transport.measure import Coupling
from mergekit_ot.transport.solver import AbstractBarycenterSolver, BarycenterProblem, Start, Status

if TYPE_CHECKING:
    from mergekit_ot.plugin_manager import PluginManager

Progress = Callable[[int, int, str], None]


def fuse(
    models: Sequence[nn.Module | SourceModel],
    *,
    solver: str | AbstractBarycenterSolver = "wb",
    solver_options: Mapping[str, object] | None = None,
    example_inputs: Tensor | tuple[object, ...] | None = None,
    model_weights: Sequence[float] | None = None,
    target: int | nn.Module | SourceModel = 0,
    measure: str | None = None,
    data: Iterable[Any] | None = None,
    calibration_size: int = 2000,
    repair: str = "none",
    device: str = "auto",
    seed: int = 0,
    executor: str = "serial",
    front_end: str = AUTO,
    limits: TraceLimits | None = None,
    manager: PluginManager | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> FusionResult:
    """Fuses independently trained networks into one.

    Args:
        models: The sources: modules, or `SourceModel` where states are read from disk.
        solver: Name of a registered solver, or a solver.
        solver_options: Options of a solver given by name.
        example_inputs: Inputs to trace the models with; the first batch of `data` where it is not given.
        model_weights: One per source, non-negative, summing to one; equal by default.
        target: Whose sizes the fused model takes: a source's number, or another module of the architecture.
        measure: What a neuron is seen by; the solver's own choice by default.
        data: Calibration batches, of inputs or (inputs, targets); targets are never read.
        calibration_size: Samples of `data` used at most.
        repair: Name of a registered repair, or ``none``.
        device: ``auto``, ``cpu`` or ``cuda``.
        seed: Seed of every random choice.
        executor: Name of a registered executor.
        front_end: What captures the models: ``auto``, ``export`` or a registered one, such as ``make-fx``.
        limits: Time and size at which tracing is stopped.
        manager: The plugins to use; the installed ones by default.
        progress: Called with (steps done, steps in all, what is done).
        dry_run: Plan only: the result holds no state.

    Returns:
        The fused state with its alignment and reports.

    Raises:
        MergeotError: Anything is wrong with the models, the options or the data.

    Example:
        >>> import torch
        >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = make()
        >>> result = fuse([model, model], solver="wb", example_inputs=torch.randn(2, 4))
        >>> bool(torch.allclose(result.state["0.weight"], model[0].weight))
        True
    """
    if manager is None:
        from mergekit_ot.plugin_manager import default_manager

        manager = default_manager()
    started = time.perf_counter()
    setup = prepare(
        models, solver=solver, solver_options=solver_options, example_inputs=example_inputs,
        model_weights=model_weights, target=target, measure=measure, data=data, calibration_size=calibration_size,
        repair=repair, device=device, seed=seed, executor=executor, manager=manager, front_end=front_end,
        limits=limits,
    )  # fmt: skip
    run = FusionRun(setup, progress)
    if not dry_run:
        run.run()
    error = None if dry_run else run.function_error()
    return FusionResult(
        run.fused, run.alignment, tuple(run.reports.values()), error, run.plan, getattr(setup.solver, "name", "?"),
        time.perf_counter() - started, tuple(run.warnings(error)), setup.target, setup.sources,
    )  # fmt: skip


class FusionRun:
    """The state of one fusion while its plan is run."""

    def __init__(self, setup: FusionSetup, progress: Progress | None = None) -> None:
        self.setup = setup
        self.progress = progress
        graph = setup.target_graph
        sizes = {key: {g.groups[key].size for g in (*setup.graphs, graph)} for key in graph.groups}
        self.groups = frozenset(k for k, g in graph.groups.items() if g.pin is None and sizes[k] != {1})
        self.plan = build_plan(graph, self.groups, type(setup.solver).max_sweeps, type(setup.solver).start)
        self.alignment = Alignment(setup.graphs, graph)
        self.fused: dict[str, Tensor] = {}
        self.reports: dict[str, GroupReport] = {}
        self.grams: ResponseGrams | None = None
        self.changed = False
        self._tensors: dict[tuple[int, str], Tensor] = {}
        self._lock = threading.Lock()

    def run(self) -> None:
        """Runs the plan: alignment, transport, average, repair."""
        setup = self.setup
        if setup.measure.needs_data:
            self.grams = ResponseGrams(setup.graphs, [source.state for source in setup.sources], sorted(self.groups))
            for inputs in setup.batches:
                self.grams.add(inputs)
        if self.plan.start is Start.IDENTITY and self._same_sizes():
            self.alignment = self.alignment.with_couplings({key: self._identity(key) for key in self.groups})
        elif self.plan.max_sweeps == 0:
            self._refuse_identity()
        sweeps = max(self.plan.max_sweeps, 1)
        shuffle = random.Random(setup.seed)
        for sweep in range(sweeps):
            self.changed, last = False, sweep + 1 == sweeps
            order = [step.number for step in self.plan.steps]
            # Before anything is aligned, a group can only be described once what lies behind it is.
            if type(setup.solver).is_order_random and self.alignment.couplings:
                shuffle.shuffle(order)
            steps = self.plan.graph(order)
            setup.executor.run(steps, lambda step, sweep=sweep, last=last: self._step(step, sweep, last))
            if not self.changed:
                break
        self._complete([name for name in setup.target_graph.layouts if name not in self.fused])
        self._finish_state()
        if setup.repair is not None:
            aligned = tuple(
                aligned_state(source, setup.target, self.alignment, i) for i, source in enumerate(setup.sources)
            )
            context = RepairContext(setup.target.instance, self.fused, aligned, setup.model_weights, setup.batches)
            self.fused = dict(setup.repair.repair(context))

    def _same_sizes(self) -> bool:
        graphs = (*self.setup.graphs, self.setup.target_graph)
        return all(len({graph.groups[key].size for graph in graphs}) == 1 for key in self.groups)

    def _refuse_identity(self) -> None:
        for key in sorted(self.groups):
            sizes = [graph.groups[key].size for graph in (*self.setup.graphs, self.setup.target_graph)]
            if len(set(sizes)) > 1:
                raise SolverError(
                    f"Solver '{self.setup.solver.name}' takes neurons as they stand, and group '{key}' has sizes "
                    f"{sizes[:-1]} for a fused size of {sizes[-1]}. Choose a solver that couples neurons, such as 'wb'."
                )

    def _identity(self, key: str) -> tuple[Coupling | FamilyCoupling, ...]:
        group = self.setup.target_graph.groups[key]
        one = identity_family(self.alignment, key) if group.context else Coupling.identity(group.size)
        return tuple(one for _ in self.setup.sources)

    def _step(self, step: Step, sweep: int, last: bool) -> None:
        reports = []
        for key in step.groups:
            if self.plan.max_sweeps > 0:
                self._solve(key)
            else:
                self.reports[key] = GroupReport(key, self.setup.target_graph.groups[key].size, None, Status.CONVERGED)
            reports.append(self.reports[key])
        if last and self.plan.max_sweeps <= 1:
            self._complete(step.completes)
            with self._lock:
                for name in step.releases:
                    for source in range(len(self.setup.sources)):
                        self._tensors.pop((source, name), None)
        report = StepReport(step.number, len(self.plan.steps), sweep, tuple(reports))
        self.setup.manager.hook.mergeot_step_done(report=report)
        if self.progress is not None:
            self.progress(step.number + 1, len(self.plan.steps), f"sweep {sweep + 1}: {step.groups[0]}")

    def _solve(self, key: str) -> None:
        setup, group = self.setup, self.setup.target_graph.groups[key]
        solver = setup.solver
        responses = self.grams.rows if self.grams is not None else None
        view = GroupView(key, self.alignment, type(solver).scope, self._read, type(solver).wants_structure, responses)
        before = self.alignment.couplings.get(key)
        if group.context or has_open_families(view):
            solve = couple_family if group.context else couple_outer
            couplings, cost = solve(view, setup.model_weights)
            status = Status.CONVERGED
        else:
            measures = setup.measure.measure(view)
            problem = BarycenterProblem(measures, setup.model_weights, group.size, before, setup.seed)  # type: ignore[arg-type]
            solution = solver.solve(problem)
            couplings, cost, status = solution.couplings, solution.cost, solution.status
            self._check_couplings(key, couplings, measures)
        with self._lock:
            self.changed |= before is None or not _same_couplings(before, couplings)
            self.alignment = self.alignment.with_couplings({key: tuple(couplings)})
            self.reports[key] = GroupReport(key, group.size, cost, status)

    def _check_couplings(self, key: str, couplings: Sequence[Coupling], measures: Sequence[Any]) -> None:
        size = self.setup.target_graph.groups[key].size
        wanted = [(size, measure.size) for measure in measures]
        found = [(coupling.target_size, coupling.source_size) for coupling in couplings]
        if wanted != found:
            raise SolverError(
                f"Solver '{self.setup.solver.name}' returned couplings of sizes {found} for group '{key}', which needs "
                f"{wanted} (fused, source). Check it with mergekit_ot.testing.check_solver."
            )

    def _read(self, source: int, name: str) -> Tensor:
        with self._lock:
            if (source, name) not in self._tensors:
                tensor = self.setup.sources[source].state[name].detach().to(self.setup.device)
                half = tensor.is_floating_point() and tensor.dtype.itemsize < 4
                self._tensors[source, name] = tensor.float() if half else tensor
            return self._tensors[source, name]

    def _complete(self, names: Iterable[str]) -> None:
        """Transports and averages parameters whose every axis is aligned."""
        for name in names:
            total: Tensor | None = None
            for source, weight in enumerate(self.setup.model_weights):
                if weight == 0:
                    continue
                moved = transport_parameter(self._read(source, name), name, self.alignment, source)
                total = moved * weight if total is None else total.add_(moved, alpha=weight)
            dtype = self.setup.sources[0].state[name].dtype
            self.fused[name] = total.to("cpu", dtype) if total is not None else torch.empty(0)

    def _finish_state(self) -> None:
        """Orders the state as the target does; what holds no neurons comes from the first source that fits."""
        self._tensors.clear()
        graph, ordered = self.setup.target_graph, {}
        for name, tensor in self.setup.target.make().state_dict().items():
            described = graph.aliases.get(name, name)
            if described in self.fused:
                ordered[name] = self.fused[described]
                continue
            own = (s.state[name] for s in self.setup.sources if name in s.state and s.state[name].shape == tensor.shape)
            ordered[name] = next(own, tensor).detach().clone()
        self.fused = ordered

    def function_error(self) -> float:
        """Returns the largest relative difference between a source's outputs and its aligned copy's."""
        worst = 0.0
        for number, source in enumerate(self.setup.sources):
            aligned = aligned_state(source, self.setup.target, self.alignment, number)
            ours = _outputs(source.instance(), self.setup.inputs)
            theirs = _outputs(self.setup.target.instance(aligned), self.setup.inputs)
            for one, other in zip(ours, theirs, strict=True):
                scale = float(one.abs().max()) or 1.0
                worst = max(worst, float((one - other).abs().max()) / scale)
        return worst

    def warnings(self, error: float | None) -> list[str]:
        """Returns what the user should know about this fusion."""
        setup, found = self.setup, list(self.setup.target_graph.diagnostics.sentences)
        exact = all(self.alignment.is_function_preserving(i) for i in range(len(setup.sources)))
        if error is not None and exact and not error < 1e-3:
            found.append(
                f"An aligned source computes something else than the source (relative error {error:.2g}) though every "
                "coupling is a permutation: a node rule is wrong for this architecture. Run 'mergeot check' on it."
            )
        elif error is not None and error > 1e-3:
            found.append(
                "Some couplings are not permutations, so aligned sources differ from the sources "
                f"(relative error {error:.2g})."
            )
        if setup.target_graph.buffers and setup.repair is None and setup.solver.name != "average":
            found.append(
                "The network has BatchNorm, whose running statistics do not fit a fused network. "
                "Give calibration data and a repair: --data SPEC --repair reset (no labels are used)."
            )
        return found


def _same_couplings(before: Sequence[Coupling | FamilyCoupling], after: Sequence[Coupling | FamilyCoupling]) -> bool:
    return all(_same(one, other) for one, other in zip(before, after, strict=True))


def _same(one: Coupling | FamilyCoupling, other: Coupling | FamilyCoupling) -> bool:
    if isinstance(one, FamilyCoupling) or isinstance(other, FamilyCoupling):
        if not (isinstance(one, FamilyCoupling) and isinstance(other, FamilyCoupling)):
            return False
        pairs = one.members.keys()
        return pairs == other.members.keys() and all(_same(one.members[p], other.members[p]) for p in pairs)
    if one.index is not None and other.index is not None:
        return bool(torch.equal(one.index.cpu(), other.index.cpu()))
    return bool(torch.allclose(one.transport_plan(), other.transport_plan().to(one.transport_plan()), atol=1e-9))


def _outputs(model: nn.Module, inputs: tuple[object, ...]) -> list[Tensor]:
    from mergekit_ot.graph.proof import float_outputs

    with torch.no_grad():
        return float_outputs(model(*inputs))
