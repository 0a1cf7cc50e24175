"""Alignment: one solver's sweeps over the groups of a plan, from a given start."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergekit_ot.errors import SolverError
from mergekit_ot.fusion.alignment import Alignment, are_same
from mergekit_ot.fusion.executor import TaskQueue
from mergekit_ot.fusion.families import starts_of
from mergekit_ot.fusion.node_measure import AbstractNodeMeasure
from mergekit_ot.fusion.plan import FusionPlan, Step
from mergekit_ot.fusion.responses import ResponseGrams
from mergekit_ot.fusion.setup import FusionSetup
from mergekit_ot.fusion.step_report import GroupReport, StepReport
from mergekit_ot.fusion.streams import StreamResponses, is_anchored, rotated_streams
from mergekit_ot.fusion.task import GroupCouplings, StepSolution, StepTask, StepTensors, run_task
from mergekit_ot.fusion.tensors import SourceTensors
from mergekit_ot.fusion.weight_rows import agreement, agreement_found
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.layouts import leaf_groups
from mergekit_ot.transport.solver import AbstractBarycenterSolver, Scope, Start

# Plans whose masses differ by less are the same: a sweep that only repeats rounding is the last.
_RELATIVE, _ABSOLUTE = 1e-5, 1e-9
# Up to so many steps an order reaches all groups in a few sweeps, and trained networks end lower from the identity.
_SHALLOW = 8


@dataclass(frozen=True)
class Material:
    """What the steps of all sweeps draw on.

    Attributes:
        tensors: Gives the sources' parameters.
        grams: Responses to calibration data, or None.
        kept: Groups that keep the couplings that an earlier solver found.
    """

    tensors: SourceTensors
    grams: ResponseGrams | None = None
    kept: frozenset[str] = frozenset()


@dataclass
class _Visit:
    """What a step saw when it was last taken, what it found, and whether other couplings were put in its place."""

    scope: Scope
    inputs: tuple[GroupCouplings | None, ...]
    solution: StepSolution | None = None
    is_over: bool = False


StepDone = Callable[[Step, StepReport, Alignment], None]


class AlignmentRun:
    """Runs the sweeps of one solver; it alone changes the alignment.

    Args:
        setup: The fusion.
        solver: The solver.
        plan: What is solved when.
        material: Tensors and responses.
        alignment: What is aligned before the first sweep.
        seed: Seed of the order of the groups, and of the solver.
        step_done: Called after every step.
        is_first: Whether no alignment went before; a further one starts at the identity where the solver has two
            starts, so that restarts differ.
    """

    def __init__(
        self,
        setup: FusionSetup,
        solver: AbstractBarycenterSolver,
        plan: FusionPlan,
        material: Material,
        alignment: Alignment,
        seed: int,
        step_done: StepDone,
        is_first: bool = True,
    ) -> None:
        self.setup, self.solver, self.plan, self.material = setup, solver, plan, material
        self.alignment, self.seed, self.step_done = alignment, seed, step_done
        self.is_first = is_first
        self.reports: dict[str, GroupReport] = {}
        self.changed = False
        self._outlines: dict[int, ModelGraph] = {}
        self._visits: dict[int, _Visit] = {}
        self.kept = material.kept

    def run(self) -> Alignment:
        """Returns the alignment after the last sweep: the step limit, or the first that changes nothing."""
        self._start()
        shuffle = random.Random(self.seed)
        is_refinement = bool(self.alignment.couplings)
        for sweep in range(max(self.plan.max_sweeps, 1)):
            self.changed = False
            # A rotated stream is aligned first, and stands on both sides of what is inside its blocks.
            sees_all = sweep > 0 or is_refinement or bool(self.alignment.rotations)
            scope = Scope.INCIDENT if sees_all else self.solver.scope
            self._sweep(sweep, self._order(shuffle), scope)
            if sweep == 0 and not is_refinement and self._tries_nothing():
                self._start_better()
            if not self.changed:
                break
        return self.alignment

    def _start(self) -> None:
        """Sets every group to the identity, where the solver starts there and nothing is aligned yet."""
        starts_there = self.plan.start is Start.IDENTITY and not self._tries_nothing()
        is_first = starts_there and not self.alignment.couplings
        identities = starts_of(self.alignment, self._keys()) if is_first else None
        if identities is not None or (is_first and self.alignment.rotations):
            # Where some sizes differ, what they belong to is described by the streams.
            self.alignment = self.alignment.with_couplings({**(identities or {}), **self._started_streams()})
        elif self.plan.max_sweeps == 0:
            self._refuse_identity()

    def _started_streams(self) -> dict[str, GroupCouplings]:
        """Returns couplings of rotated streams: from what anchors them, or from their activations, to be kept."""
        steps = {step.groups[0]: step for step in self.plan.steps}
        streams = [key for key in rotated_streams(self.alignment, self.setup.models.normal) if key in steps]
        loose = [key for key in streams if not is_anchored(key, self.alignment, self.material.tensors)]
        solved = StreamResponses(self.setup).barycenters(loose, self.alignment, self.solver, self.seed)
        self.kept |= frozenset(solved)
        found: dict[str, GroupCouplings] = {}
        for key, barycenter in solved.items():
            found[key], size = barycenter.couplings, self.alignment.target.groups[key].size
            self.reports[key] = GroupReport(key, size, barycenter.cost, barycenter.status, self.solver.name)
        for key in streams:
            if key not in found:
                found |= run_task(self._task(steps[key].number, Scope.INCIDENT)).couplings
        return found

    def _start_better(self) -> None:
        """Goes back to the identity where the first sweep, which started from nothing, leaves more apart than that."""
        identities, tensors, weights = self._identities(), self.material.tensors, self.setup.model_weights
        kept = [visit.solution.kept for visit in self._visits.values() if visit.solution is not None]
        found = agreement_found(kept, self.alignment, tensors, weights)
        if found is None:
            found = agreement(tensors, self.alignment, weights)
        there = agreement(tensors, identities, weights)
        if there > found:
            self.alignment, self.changed = identities, True
            for visit in self._visits.values():
                visit.is_over = True

    def _identities(self) -> Alignment:
        return self.alignment.with_couplings(starts_of(self.alignment, self._keys()) or {})

    def _tries_nothing(self) -> bool:
        is_deep = len(self.plan.steps) > _SHALLOW
        # Streams that rotate have a start of their own.
        if not (self.is_first and self.solver.tries_nothing and is_deep) or self.alignment.rotations:
            return False
        groups = self.setup.models.target_graph.groups
        has_families = any(groups[key].context for key in self._keys())
        return self.plan.max_sweeps > 1 and self._same_sizes() and not has_families

    def _order(self, shuffle: random.Random) -> list[int]:
        order = [step.number for step in self.plan.steps if step.groups[0] not in self.kept]
        # Before anything is aligned, a group can only be described once what lies behind it is.
        if self.solver.is_order_random and self.alignment.couplings:
            shuffle.shuffle(order)
        return order

    def _sweep(self, sweep: int, order: Sequence[int], scope: Scope) -> None:
        def accept(solution: StepSolution) -> None:
            self._accept(solution, sweep)

        queue = TaskQueue(self.plan.waits(order), lambda number: self._task(number, scope), accept)
        self.setup.methods.executor.run(queue)
        if not queue.is_done:
            raise SolverError(
                f"Executor '{self.setup.options.executor}' ended a sweep with steps left over. "
                "Check it with mergekit_ot.testing.check_executor."
            )

    def _keys(self) -> list[str]:
        return [key for step in self.plan.steps for key in step.groups]

    def _same_sizes(self) -> bool:
        return all(len(set(self.setup.models.sizes(key))) == 1 for key in self._keys())

    def _refuse_identity(self) -> None:
        for key in sorted(self._keys()):
            sizes = self.setup.models.sizes(key)
            if len(set(sizes)) > 1:
                raise SolverError(
                    f"Solver '{self.solver.name}' takes neurons as they stand, and group '{key}' has sizes "
                    f"{sizes[:-1]} for a fused size of {sizes[-1]}. Choose a solver that couples neurons, such as 'wb'."
                )

    def _task(self, number: int, scope: Scope) -> StepTask:
        step, graphs = self.plan.steps[number], self.alignment.graphs
        grams = self.material.grams
        solver, measure = self._methods_of(step)
        return StepTask(
            number=number,
            groups=step.groups,
            scope=scope,
            solver=solver,
            measure=measure,
            alignment=replace(
                self.alignment,
                graphs=tuple(self._outline(graph) for graph in graphs),
                target=self._outline(self.alignment.target),
            ),
            tensors=StepTensors(self.material.tensors.read, len(graphs), step.reads),
            responses=None if grams is None else grams.of(step.groups),
            model_weights=self.setup.model_weights,
            seed=self.seed,
            threads=self.setup.options.threads,
            **self._remembered(step, scope),
        )

    def _methods_of(self, step: Step) -> tuple[AbstractBarycenterSolver, AbstractNodeMeasure]:
        """Returns what couples the neurons of a step, and what they are seen by; a refinement has its own ways."""
        methods = self.setup.methods
        if not methods.of_layers or self.solver is not methods.solver:
            return self.solver, methods.measure
        members = (slot for key in step.groups for slot in self.alignment.target.groups[key].members)
        return methods.of_step({slot.parameter for slot in members if not slot.is_reader})

    def _remembered(self, step: Step, scope: Scope) -> dict[str, Any]:
        """Returns what the last visit of a step left: products, and its solution where all is as it was then."""
        couplings = self.alignment.couplings
        own = set(step.groups) if self._methods_of(step)[0].is_settled else set()
        inputs = tuple(couplings.get(key) for key in self._beside(step) if key not in own)
        last, visit = self._visits.get(step.number), _Visit(scope, inputs)
        self._visits[step.number] = visit
        if last is None or last.solution is None:
            return {}
        visit.solution = last.solution
        is_known = (
            last.scope is scope
            and not last.is_over
            and all(now is then for now, then in zip(inputs, last.inputs, strict=True))
        )
        return {"kept": last.solution.kept, "known": last.solution if is_known else None}

    def _beside(self, step: Step) -> tuple[str, ...]:
        """Returns all groups whose couplings a step can see."""
        graph = self.setup.models.target_graph
        held = {key for name in step.reads for layout in graph.layouts[name] for key in leaf_groups(layout)}
        return tuple(sorted(held.union(*(graph.groups[key].context for key in held))))

    def _outline(self, graph: ModelGraph) -> ModelGraph:
        """Returns a graph without its program, which no step needs and no other process should be sent."""
        if id(graph) not in self._outlines:
            self._outlines[id(graph)] = graph.outline()
        return self._outlines[id(graph)]

    def _accept(self, solution: StepSolution, sweep: int) -> None:
        step = self.plan.steps[solution.number]
        self.changed |= not self._holds(solution.couplings)
        if self.plan.max_sweeps > 1:
            self._visits[solution.number].solution = solution
        # What is found again stays the same object: a step that sees it has nothing new to look at.
        new = {key: found for key, found in solution.couplings.items() if not self._is_in_force(key, found)}
        self.alignment = self.alignment.with_couplings(new)
        self.reports.update({report.name: report for report in solution.reports})
        report = StepReport(step.number, len(self.plan.steps), sweep, solution.reports)
        self.step_done(step, report, self.alignment)

    def _holds(self, couplings: Mapping[str, GroupCouplings]) -> bool:
        """Whether couplings are in force already."""
        for key, found in couplings.items():
            before = self.alignment.couplings.get(key)
            if before is None or not are_same(before, found, _RELATIVE, _ABSOLUTE):
                return False
        return True

    def _is_in_force(self, key: str, found: GroupCouplings) -> bool:
        before = self.alignment.couplings.get(key)
        return before is not None and are_same(before, found)
