"""The engine: runs a plan step by step and puts the fused model together."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergekit_ot.fusion.alignment import Alignment
from mergekit_ot.fusion.plan import Step, build_plan
from mergekit_ot.fusion.repair import repair_context
from mergekit_ot.fusion.responses import ResponseGrams
from mergekit_ot.fusion.result import FusionResult, GroupReport, aligned_state
from mergekit_ot.fusion.setup import FusionSetup, prepare
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.fusion.sweeps import AlignmentRun, Progress
from mergekit_ot.fusion.tensors import SourceTensors, alignment_objective
from mergekit_ot.graph.capture import AUTO
from mergekit_ot.graph.front_end import TraceLimits
from mergekit_ot.graph.signs import find_signs
from mergekit_ot.transport.solver import AbstractBarycenterSolver

if TYPE_CHECKING:
    from mergekit_ot.plugin_manager import PluginManager


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
    refine: bool = False,
    restarts: int = 1,
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
        refine: Whether to sweep on from the couplings found, every neuron seen by all its weights, until no gain.
        restarts: How often to align, each time with another seed; the least objective is kept.
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
        repair=repair, device=device, seed=seed, refine=refine, restarts=restarts, executor=executor, manager=manager,
        front_end=front_end, limits=limits,
    )  # fmt: skip
    run = FusionRun(setup, progress)
    if not dry_run:
        run.run()
    error = None if dry_run else run.function_error()
    return FusionResult(
        run.fused, run.alignment, tuple(run.reports.values()), error, run.plan, getattr(setup.solver, "name", "?"),
        time.perf_counter() - started, tuple(run.warnings(error)), setup.target, setup.sources,
        run.objectives, tuple(run.notes),
    )  # fmt: skip


class FusionRun:
    """The state of one fusion while its plan is run."""

    def __init__(self, setup: FusionSetup, progress: Progress | None = None) -> None:
        self.setup = setup
        self.progress = progress
        graph = setup.target_graph
        sizes = {key: {g.groups[key].size for g in (*setup.graphs, graph)} for key in graph.groups}
        self.groups = frozenset(k for k, g in graph.groups.items() if g.pin is None and sizes[k] != {1})
        self.plan = build_plan(graph, self.groups, setup.solver.max_sweeps, setup.solver.start)
        self.alignment = Alignment(setup.graphs, graph, scaling=setup.solver.scaling)
        self.tensors = SourceTensors(setup.sources, setup.device)
        self.fused: dict[str, Tensor] = {}
        self.reports: dict[str, GroupReport] = {}
        self.objectives: dict[str, float] = {}
        self.notes: list[str] = []
        self.grams: ResponseGrams | None = None

    def run(self) -> None:
        """Runs the plan: alignment, refinement, transport, average, repair."""
        setup = self.setup
        if any(solver is not None and solver.uses_signs for solver in (setup.solver, setup.refinement)):
            signs = find_signs(setup.target_graph, setup.target.make, setup.inputs)
            self.alignment = replace(self.alignment, signs=signs)
        if setup.measure.needs_data:
            self.grams = ResponseGrams(setup.graphs, [source.state for source in setup.sources], sorted(self.groups))
            for inputs in setup.batches:
                self.grams.add(inputs)
        self._align()
        if setup.refinement is not None:
            self._refine(setup.refinement)
        self._complete([name for name in setup.target_graph.layouts if name not in self.fused], self.alignment)
        self._finish_state()
        if setup.repair is not None:
            aligned = tuple(
                aligned_state(source, setup.target, self.alignment, i) for i, source in enumerate(setup.sources)
            )
            context = repair_context(
                self.fused, aligned, setup.target, setup.sources, self.alignment, setup.model_weights, setup.batches,
                self.progress, self.notes.append,
            )  # fmt: skip
            self.fused = dict(setup.repair.repair(context))

    def _align(self) -> None:
        """Aligns from scratch, as often as restarts are asked for, and keeps the least objective."""
        setup, best = self.setup, None
        is_single = self.plan.max_sweeps <= 1 and setup.restarts == 1 and setup.refinement is None
        for restart in range(setup.restarts):
            run = AlignmentRun(
                setup, setup.solver, self.plan, self.tensors, self.grams, self.alignment, setup.seed + restart,
                self._step_done if is_single else None, self.progress,
            )  # fmt: skip
            found = run.run()
            objective = self._objective(found) if setup.restarts > 1 else None
            if best is None or (objective is not None and objective < best[0]):
                best = (float("inf") if objective is None else objective, found, run.reports)
        if best is not None:
            objective, self.alignment, self.reports = best
            if setup.restarts > 1:
                self.objectives["aligned"] = objective

    def _refine(self, solver: AbstractBarycenterSolver) -> None:
        """Sweeps on with the refinement, and keeps what it finds where the objective is no worse."""
        plan = build_plan(self.setup.target_graph, self.groups, solver.max_sweeps, solver.start)
        run = AlignmentRun(
            self.setup, solver, plan, self.tensors, None, self.alignment, self.setup.seed, None, self.progress
        )
        found = run.run()
        before, after = self._objective(self.alignment), self._objective(found)
        if before is not None:
            self.objectives["before refinement"] = before
        if before is None or after is None or after <= before:
            self.alignment, self.reports = found, {**self.reports, **run.reports}
            before = after
        if before is not None:
            self.objectives["after refinement"] = before

    def _objective(self, alignment: Alignment) -> float | None:
        weight = self.setup.solver.structure_weight
        return alignment_objective(self.tensors, alignment, self.setup.model_weights, weight)

    def _step_done(self, step: Step, alignment: Alignment) -> None:
        self._complete(step.completes, alignment)
        self.tensors.release(step.releases)

    def _complete(self, names: Iterable[str], alignment: Alignment) -> None:
        """Transports and averages parameters whose every axis is aligned."""
        for name in names:
            dtype = self.setup.sources[0].state[name].dtype
            self.fused[name] = self.tensors.fused(name, alignment, self.setup.model_weights).to("cpu", dtype)

    def _finish_state(self) -> None:
        """Orders the state as the target does; what holds no neurons comes from the first source that fits."""
        self.tensors.release()
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
                "Give calibration data and a repair: --data SPEC --repair refit, or reset (no labels are used)."
            )
        return found


def _outputs(model: nn.Module, inputs: tuple[object, ...]) -> list[Tensor]:
    from mergekit_ot.graph.proof import float_outputs

    with torch.no_grad():
        return float_outputs(model(*inputs))
