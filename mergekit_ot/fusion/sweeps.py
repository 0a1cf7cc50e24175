"""Alignment: one solver's sweeps over the groups of a plan, from a given start."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence

from mergekit_ot.errors import SolverError
from mergekit_ot.fusion.alignment import Alignment, FamilyCoupling
from mergekit_ot.fusion.families import couple_family, couple_outer, has_open_families, identity_family
from mergekit_ot.fusion.group_view import GroupView
from mergekit_ot.fusion.plan import FusionPlan, Step
from mergekit_ot.fusion.responses import ResponseGrams
from mergekit_ot.fusion.setup import FusionSetup
from mergekit_ot.fusion.step_report import GroupReport, StepReport
from mergekit_ot.fusion.tensors import SourceTensors
from mergekit_ot.progress import Progress
from mergekit_ot.transport.coupling import Coupling
from mergekit_ot.transport.permutation import Permutation
from mergekit_ot.transport.problem import BarycenterProblem, Status
from mergekit_ot.transport.solver import AbstractBarycenterSolver, Scope, Start

# Plans whose masses differ by less are the same: a sweep that only repeats rounding is the last.
_RELATIVE, _ABSOLUTE = 1e-5, 1e-9


class AlignmentRun:
    """Runs the sweeps of one solver.

    Args:
        setup: The fusion.
        solver: The solver.
        plan: What is solved when.
        tensors: Gives the sources' parameters.
        grams: Responses to calibration data, or None.
        alignment: What is aligned before the first sweep.
        seed: Seed of the order of the groups, and of the solver.
        step_done: Called after every step of a plan with a single sweep.
        progress: Called with (steps done, steps in all, what is done).
    """

    def __init__(
        self,
        setup: FusionSetup,
        solver: AbstractBarycenterSolver,
        plan: FusionPlan,
        tensors: SourceTensors,
        grams: ResponseGrams | None,
        alignment: Alignment,
        seed: int,
        step_done: Callable[[Step, Alignment], None] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.setup, self.solver, self.plan, self.tensors, self.grams = setup, solver, plan, tensors, grams
        self.alignment, self.seed = alignment, seed
        self.step_done, self.progress = step_done, progress
        self.reports: dict[str, GroupReport] = {}
        self.changed = False
        self._lock = threading.Lock()

    def run(self) -> Alignment:
        """Returns the alignment after the last sweep: the step limit, or the first that changes nothing."""
        if self.plan.start is Start.IDENTITY and not self.alignment.couplings and self._same_sizes():
            self.alignment = self.alignment.with_couplings({key: self._identity(key) for key in self._keys()})
        elif self.plan.max_sweeps == 0:
            self._refuse_identity()
        sweeps = max(self.plan.max_sweeps, 1)
        shuffle = random.Random(self.seed)
        is_refinement = bool(self.alignment.couplings)
        for sweep in range(sweeps):
            self.changed = False
            order = [step.number for step in self.plan.steps]
            # Before anything is aligned, a group can only be described once what lies behind it is.
            if self.solver.is_order_random and self.alignment.couplings:
                shuffle.shuffle(order)
            scope = Scope.INCIDENT if sweep > 0 or is_refinement else self.solver.scope
            steps = self.plan.graph(order)
            self.setup.executor.run(steps, lambda step, sweep=sweep, scope=scope: self._step(step, sweep, scope))
            if not self.changed:
                break
        return self.alignment

    def _keys(self) -> list[str]:
        return [key for step in self.plan.steps for key in step.groups]

    def _same_sizes(self) -> bool:
        graphs = (*self.setup.graphs, self.setup.target_graph)
        return all(len({graph.groups[key].size for graph in graphs}) == 1 for key in self._keys())

    def _refuse_identity(self) -> None:
        for key in sorted(self._keys()):
            sizes = [graph.groups[key].size for graph in (*self.setup.graphs, self.setup.target_graph)]
            if len(set(sizes)) > 1:
                raise SolverError(
                    f"Solver '{self.solver.name}' takes neurons as they stand, and group '{key}' has sizes "
                    f"{sizes[:-1]} for a fused size of {sizes[-1]}. Choose a solver that couples neurons, such as 'wb'."
                )

    def _identity(self, key: str) -> tuple[Coupling | FamilyCoupling, ...]:
        group = self.setup.target_graph.groups[key]
        identity = identity_family(self.alignment, key) if group.context else Permutation.identity(group.size)
        return (identity,) * len(self.setup.sources)

    def _step(self, step: Step, sweep: int, scope: Scope) -> None:
        reports = []
        for key in step.groups:
            if self.plan.max_sweeps > 0:
                self._solve(key, scope)
            else:
                self.reports[key] = GroupReport(key, self.setup.target_graph.groups[key].size, None, Status.CONVERGED)
            reports.append(self.reports[key])
        if self.step_done is not None:
            self.step_done(step, self.alignment)
        report = StepReport(step.number, len(self.plan.steps), sweep, tuple(reports))
        for observe in self.setup.observers:
            observe(report)
        if self.progress is not None:
            self.progress(step.number + 1, len(self.plan.steps), f"sweep {sweep + 1}: {step.groups[0]}")

    def _solve(self, key: str, scope: Scope) -> None:
        setup, group, solver = self.setup, self.setup.target_graph.groups[key], self.solver
        responses = self.grams.rows if self.grams is not None else None
        view = GroupView(
            key, self.alignment, scope, self.tensors.read, solver.wants_structure, responses, solver.members
        )
        before = self.alignment.couplings.get(key)
        if group.context or has_open_families(view):
            solve = couple_family if group.context else couple_outer
            couplings, cost = solve(view, setup.model_weights)
            status = Status.CONVERGED
        else:
            measures = setup.measure.measure(view)
            problem = BarycenterProblem(measures, setup.model_weights, group.size, before, self.seed, key)  # type: ignore[arg-type]
            solution = solver.solve(problem)
            couplings, cost, status = solution.couplings, solution.cost, solution.status
        with self._lock:
            self.changed |= before is None or not _same_couplings(before, couplings)
            self.alignment = self.alignment.with_couplings({key: tuple(couplings)})
            self.reports[key] = GroupReport(key, group.size, cost, status)


def _same_couplings(before: Sequence[Coupling | FamilyCoupling], after: Sequence[Coupling | FamilyCoupling]) -> bool:
    return all(old.is_same(new, _RELATIVE, _ABSOLUTE) for old, new in zip(before, after, strict=True))
