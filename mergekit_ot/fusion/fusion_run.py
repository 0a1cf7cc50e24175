"""One run of a fusion: alignment, refinement, transport, average, guard, repair."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from mergekit_ot.fusion.advice import advice
from mergekit_ot.fusion.alignment import Alignment
from mergekit_ot.fusion.comparison import RepairComparison
from mergekit_ot.fusion.extent import Extent, check_something_is_free, extent_of
from mergekit_ot.fusion.fallback import chosen
from mergekit_ot.fusion.families import with_starts
from mergekit_ot.fusion.function_check import REFUSED, FunctionCheck, check_function
from mergekit_ot.fusion.heads import heads_note, joined_head
from mergekit_ot.fusion.judging import judged
from mergekit_ot.fusion.layer_rules import kept_notes
from mergekit_ot.fusion.moving import moved_state
from mergekit_ot.fusion.plan import Step, build_plan
from mergekit_ot.fusion.repair import AbstractRepair, AlignedModels, plain_mean, repair_context, repaired_unless_worse
from mergekit_ot.fusion.responses import ResponseGrams
from mergekit_ot.fusion.setup import FusionSetup
from mergekit_ot.fusion.step_check import check_step
from mergekit_ot.fusion.step_report import GroupReport, StepReport
from mergekit_ot.fusion.sweeps import AlignmentRun, Material
from mergekit_ot.fusion.symmetries import find_symmetries, symmetries_for
from mergekit_ot.fusion.task import NOBODY
from mergekit_ot.fusion.tensors import SourceTensors, alignment_objective
from mergekit_ot.fusion.tying import tied_again
from mergekit_ot.fusion.written import CheckedWriter, ResultCheck, template_of
from mergekit_ot.graph.symmetry.symmetry import Places
from mergekit_ot.progress import Progress
from mergekit_ot.storage.fitting import FittedStore
from mergekit_ot.storage.store import MemoryWriter, StoreWriter, write_all
from mergekit_ot.transport.solver import AbstractBarycenterSolver


class FusionRun:
    """The state of one fusion while its plan is run."""

    def __init__(self, setup: FusionSetup, progress: Progress | None = None, writer: StoreWriter | None = None) -> None:
        self.setup, self.models, self.methods, self.progress = setup, setup.models, setup.methods, progress
        graph, solver = self.models.target_graph, setup.methods.solver
        self.groups = frozenset(
            key for key, group in graph.groups.items() if group.pin is None and set(self.models.sizes(key)) != {1}
        )
        self.plan = build_plan(graph, self.groups, solver.max_sweeps, solver.start)
        self.alignment = Alignment(self.models.graphs, graph, scaling=solver.scaling, uncompared=self.models.uncompared)
        self.tensors = SourceTensors(self.models.sources, setup.device)
        self.writer = writer
        self.template = template_of(self.models.target, self.models.sources)
        # A repair needs the whole mean before anything is written.
        normal = self.models.normal
        self.is_tied_again = normal is not None and bool(normal.aliases) and not setup.options.untie
        is_mended = self.methods.repair is not None or setup.options.fallback or self.is_tied_again
        self.is_kept = writer is None or is_mended
        mean = MemoryWriter() if self.is_kept or writer is None else writer
        self.mean = CheckedWriter(mean, self._check_of(f"solver '{solver.name}'"))
        self.check: FunctionCheck | None = None
        self.completed: set[str] = set()
        self.fused: Mapping[str, Tensor] = {}
        self.reports: dict[str, GroupReport] = {}
        self.objectives: dict[str, float] = {}
        self.notes: list[str] = list(setup.notes)
        self.notes += kept_notes(self.models.rules, [source.name for source in self.models.sources])
        if self.models.growth is not None:
            self.notes.append(self.models.growth.sentence)
        if self.models.heads:
            names = [source.name for source in self.models.sources]
            self.notes.append(heads_note(names, self.models.graphs, self.models.heads))
        self.comparison: RepairComparison | None = None
        self.alone: int | None = None
        self.grams: ResponseGrams | None = None
        self.symmetries: Mapping[str, Mapping[str, Places]] = {}
        self.kept: frozenset[str] = frozenset()

    def run(self) -> None:
        """Runs the plan: alignment, refinement, transport, average, the guard, repair.

        Raises:
            ResultError: Nothing can be aligned, an aligned source computes something else, or the result is odd.
            SolverError: A solver could not compare neurons, or broke its contract.
        """
        setup = self.setup
        if self.methods.solver.max_sweeps > 0 and len(self.models.sources) > 1:
            check_something_is_free(self.models.target_graph, self.groups, self.models.target.name)
        self.symmetries = find_symmetries(setup)
        self.alignment = replace(self.alignment, symmetries=symmetries_for(self.symmetries, self.methods.solver))
        self._plan_rotations()
        self.start = self.alignment
        if self.methods.needs_data:
            states = [dict(source.state) for source in self.models.sources]
            self.grams = ResponseGrams(self.models.graphs, states, sorted(self.groups), len(setup.batches))
            for inputs in setup.batches:
                self.grams.add(inputs)
        self._align()
        if self.methods.refinement is not None:
            self._refine(self.methods.refinement)
        left = [name for name in self.models.target_graph.layouts if name not in self.completed]
        self._complete(left, self.alignment)
        self.tensors.release()
        # Before anything that is written is finished; what nothing read so far is looked at as well.
        for source in self.models.sources:
            source.state.check_all()
        models = self._aligned_models()
        self.check = check_function(models, setup.inputs, self.template, setup.options.seed)
        if self.methods.solver.max_sweeps == 0:
            self.check = replace(self.check, is_coupled=False)
        self._finish_state()
        if self.methods.repair is not None:
            self._mend(self.methods.repair)
        elif setup.held_out:
            mean = plain_mean(models, setup.model_weights)
            self.comparison, why = judged(setup, models.target, models.sources, self.fused, mean)
            self.notes += why
        if setup.options.fallback:
            found = chosen(self.comparison, models, self.template)
            self.notes.append(found.note)
            self.alone, self.fused = found.source, self.fused if found.state is None else found.state
        if self.alone is None and self.is_tied_again and self.models.normal is not None:
            originals = [source.state for source in self.models.originals]
            self.fused = tied_again(self.fused, self.models.normal, originals, self._weights_of)
        if self.is_kept and self.writer is not None:
            write_all(self.fused, self.writer)
            self.fused = FittedStore(self.writer.reopened(), self.fused)

    def _aligned_models(self) -> AlignedModels:
        models = self.models
        kept, joined = frozenset(models.rules.kept), frozenset(models.heads)
        return AlignedModels(
            models.target, models.sources, self.alignment, models.normal, models.originals, kept, joined
        )

    def aligned_alone(self) -> FusionRun:
        """Returns the run with its alignment, and with nothing averaged: for an average that was made without it."""
        material, seed = Material(self.tensors), self.setup.options.seed
        run = AlignmentRun(self.setup, self.methods.solver, self.plan, material, self.alignment, seed, lambda *_: None)
        self.alignment, self.reports = run.run(), run.reports
        return self

    def _plan_rotations(self) -> None:
        """Takes the pinned groups into the plan of which a symmetry allows more than to stay."""
        turned = frozenset(self.alignment.rotations) - self.groups
        if turned:
            solver = self.methods.solver
            self.groups |= turned
            self.plan = build_plan(self.models.target_graph, self.groups, solver.max_sweeps, solver.start)

    def _align(self) -> None:
        """Aligns from scratch, as often as restarts are asked for, and keeps the least objective."""
        options = self.setup.options
        is_single = self.plan.max_sweeps <= 1 and options.restarts == 1 and self.methods.refinement is None
        step_done = self._completing if is_single else self._observed
        material = Material(self.tensors, self.grams)
        least = float("inf")
        for restart in range(options.restarts):
            seed, is_first = options.seed + restart, restart == 0
            run = AlignmentRun(
                self.setup, self.methods.solver, self.plan, material, self.start, seed, step_done, is_first
            )
            alignment = run.run()
            self.kept |= run.kept
            objective = self._objective(alignment) if options.restarts > 1 else None
            if restart == 0 or (objective is not None and objective < least):
                self.alignment, self.reports = alignment, run.reports
                least = least if objective is None else objective
        if options.restarts > 1:
            self.objectives["aligned"] = least

    def _refine(self, solver: AbstractBarycenterSolver) -> None:
        """Sweeps on with the refinement, and keeps what it finds where the objective is no worse."""
        self.alignment = replace(self.alignment, symmetries=self.symmetries)
        self._plan_rotations()
        self.alignment = with_starts(self.alignment, self.groups)
        plan = build_plan(self.models.target_graph, self.groups, solver.max_sweeps, solver.start)
        run = AlignmentRun(
            self.setup,
            solver,
            plan,
            Material(self.tensors, kept=self.kept),
            self.alignment,
            self.setup.options.seed,
            self._observed,
        )
        refined = run.run()
        before, after = self._objective(self.alignment), self._objective(refined)
        if before is not None:
            self.objectives["before refinement"] = before
        if before is None or after is None or after <= before:
            self.alignment, self.reports = refined, {**self.reports, **run.reports}
            before = after
        if before is not None:
            self.objectives["after refinement"] = before

    def _objective(self, alignment: Alignment) -> float | None:
        weight = self.methods.solver.structure_weight
        return alignment_objective(self.tensors, alignment, self.setup.model_weights, weight)

    def _completing(self, step: Step, report: StepReport, alignment: Alignment) -> None:
        """Follows a step after which no other changes its couplings: what is aligned now is averaged and let go."""
        check_step(report, alignment, self.models.sources)
        self._complete(step.completes, alignment)
        self.tensors.release(step.releases)
        self._observed(step, report, alignment)

    def _observed(self, step: Step, report: StepReport, alignment: Alignment) -> None:
        check_step(report, alignment, self.models.sources)
        for observe in self.setup.observers:
            observe(report)
        if self.progress is not None:
            self.progress(step.number + 1, report.total, f"sweep {report.sweep + 1}: {step.groups[0]}")

    def _complete(self, names: Iterable[str], alignment: Alignment) -> None:
        """Transports, averages and writes parameters whose every axis is aligned."""
        for name in names:
            dtype = self.models.sources[0].state.dtype(name)
            tensor = self._fused(name, alignment).to("cpu", dtype)
            for spelling in self._spellings(name):
                self.mean.write(spelling, tensor)
            self.completed.add(name)

    def _fused(self, name: str, alignment: Alignment) -> Tensor:
        """Returns a fused parameter: a mean with the weights that hold for it, or the heads of all sources."""
        axis = self.models.heads.get(name)
        if axis is not None:
            return joined_head(name, axis, self.tensors.read, alignment)
        return self.tensors.fused(name, alignment, self._weights_of(name))

    def _weights_of(self, name: str) -> tuple[float, ...]:
        """Returns the model weights that hold for a parameter."""
        return self.models.rules.weights_of(name, self.setup.model_weights)

    def _spellings(self, name: str) -> list[str]:
        """Returns all names of a parameter in the state dict: several where it is tied."""
        aliases, state = self.models.target_graph.aliases, self.models.sources[0].state
        return [name, *(alias for alias, described in aliases.items() if described == name and alias in state)]

    def _finish_state(self) -> None:
        """Writes what holds no neurons, from the first source that fits, and orders the state as the target does."""
        sources, aliases = self.models.sources, self.models.target_graph.aliases
        for name, tensor in self.template.items():
            if aliases.get(name, name) in self.completed:
                continue
            kept = self.models.rules.kept.get(name)
            ordered = sources if kept is None else (sources[kept], *sources)
            fitting = (s.state for s in ordered if name in s.state and s.state.shape(name) == tensor.shape)
            state = next(fitting, None)
            self.mean.write(name, (tensor if state is None else state.read(name)).detach().clone())
        self.mean.close()
        written = FittedStore(self.mean.reopened(), self.template)
        self.fused = dict(written) if self.is_kept else written

    def _mend(self, repair: AbstractRepair) -> None:
        """Repairs the mean, and writes what comes of it."""
        setup, sources = self.setup, self.models.sources
        states = [source.state for source in sources]
        aligned = [moved_state(state, self.template, self.alignment, number) for number, state in enumerate(states)]
        models = self._aligned_models()
        context = repair_context(
            models, self.fused, aligned, setup.model_weights, setup.batches, self.progress, self.notes.append
        )
        context = replace(context, device=str(setup.device), seed=setup.options.seed)
        name, held_out = setup.options.repair, setup.held_out
        self.fused, self.comparison = repaired_unless_worse(repair, name, context, models, held_out, self.template)

    def _check_of(self, maker: str) -> ResultCheck:
        return ResultCheck(self.template, self.models.sources, maker)

    def extent(self) -> Extent:
        """Returns how much is aligned; for a dry run, how much would be."""
        left = {report.name for report in self.reports.values() if report.solver == NOBODY}
        is_coupling = self.methods.solver.max_sweeps > 0
        return extent_of(self.models.target_graph, self.groups - left if is_coupling else (), self.groups)

    def warnings(self) -> list[str]:
        """Returns what the user should know about this fusion."""
        found = list(self.models.target_graph.diagnostics.sentences)
        found += [] if self.comparison is None else self.comparison.warnings
        if self.check is not None:
            found += self.check.remarks
            if self.check.error > REFUSED and not self.check.is_exact:
                found.append(
                    "Some couplings are not permutations, so aligned sources differ from the sources "
                    f"(relative error {self.check.error:.2g})."
                )
        return [*found, *advice(self.setup, self.models.target_graph)]
