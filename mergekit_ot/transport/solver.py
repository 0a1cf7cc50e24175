"""The class that every solver derives from: it finds couplings, and all that follows from them is done once, here."""

from __future__ import annotations

import abc
import enum
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, final

from annotated_types import Ge, Le

from mergekit_ot.errors import PluginError, SolverError, blaming
from mergekit_ot.transport.barycenter import barycenter_cost, fused_measure, in_order_of, rounding_error, unsolved
from mergekit_ot.transport.coupling import Coupling
from mergekit_ot.transport.ground_cost import at_least_single
from mergekit_ot.transport.measure import NeuronMeasure, uniform_mass
from mergekit_ot.transport.options import MOST_STEPS, check_options
from mergekit_ot.transport.problem import Barycenter, BarycenterProblem, Solution, Status
from mergekit_ot.transport.scale import Scaled
from mergekit_ot.transport.watch import MeasureWatch

_MARGINAL_TOLERANCE = 1e-5


class Scope(enum.Enum):
    """Which tensors describe a neuron: only those behind it, or every tensor that touches it.

    Example:
        >>> Scope("incident") is Scope.INCIDENT
        True
    """

    INCOMING = "incoming"
    INCIDENT = "incident"


class Start(enum.Enum):
    """What counts as aligned before the first step: nothing, or every group at the identity.

    Example:
        >>> from mergekit_ot import default_manager
        >>> default_manager().get("solver", "weight-matching").start
        <Start.IDENTITY: 'identity'>
    """

    NOTHING = "nothing aligned"
    IDENTITY = "identity"


class AbstractBarycenterSolver(abc.ABC):
    """Base of all solvers. A subclass is a frozen dataclass whose fields are its options, and writes `find`.

    Options are annotated with what they may be, such as ``Annotated[int, Ge(1)]`` (of annotated-types) or
    ``Literal["full", "half"]``; whatever a user gives is held to that before a solver is made.

    `solve` is final. It hands on what is not finite, checks the couplings that `find` returns, keeps those in force
    where they cost no more, puts the fused neurons into the order of one source, and works out the fused measure and
    its cost. So a solver only looks for couplings.

    The contract, checked by `mergekit_ot.testing.check_solver`: identical measures give identity couplings;
    permuting a source's rows permutes its plan; marginals are right; inputs stay untouched; dtype and device
    are kept; the same seed gives the same result; the cost never exceeds that of ``problem.initial``.

    Facts about the class, for all of its instances:
        name: The name on the command line.
        summary: One line for ``mergeot plugins``.
        measure: Name of the node measure used where the user names none.
        refines: Whether the solver sweeps on from couplings in force, as ``--refine`` asks for.
        own_options: Options that a refining solver does not take over from the solver that it follows.

    What the engine asks an instance. A subclass assigns another value (``scope = Scope.INCIDENT``), or makes it a
    field, and so an option of the user (``max_sweeps: int = 1``); what follows from other options is set in
    ``__post_init__``:
        scope: Which tensors describe a neuron.
        start: What counts as aligned before the first step.
        tries_nothing: Whether the identity as a start is given up where a first sweep from nothing aligned leaves less
            apart, in networks of more than eight steps; groups that hold families start at the identity in any case.
        wants_structure: Whether groups that do not refer to themselves get a structure too (distances
            between a neuron's weight vector and the others').
        uses_signs: Whether the solver negates neurons where a measure's `Signs` say that it may.
        uses_rotations: Whether it rotates them, too: sources are then aligned in their normal forms, in which residual
            streams behind norms and the inner spaces of heads may be rotated.
        is_order_random: Whether each sweep visits the groups in a new random order (seeded).
        is_settled: Whether a solve from its own couplings would find them again, so that a group is not visited again
            before something around it has changed.
        max_sweeps: Sweeps over the groups at most; the engine stops earlier when no sweep gains. From the second
            sweep on, neurons are seen by every tensor that touches them.
        members: Which tensors that own a group's neurons describe them: ``all``, or only the ``first``.
        scaling: ``density`` (groups of different size compare as functions), or ``paper`` to compare and average the
            numbers themselves.
        has_free_masses: Whether fused neurons may share a source's mass unevenly: clusters of neurons do.
        structure_weight: Weight of the tensors in which a group refers to itself, in the objective of the whole.

    Example:
        >>> import torch
        >>> from mergekit_ot import couple, ground_cost
        >>> class NearestSolver(AbstractBarycenterSolver):
        ...     name = "nearest"
        ...
        ...     def find(self, problem):
        ...         first = problem.measures[0].support
        ...         return tuple(couple(ground_cost(first, measure.support)) for measure in problem.measures)
        >>> measures = tuple(NeuronMeasure.uniform(torch.tensor(rows)) for rows in ([[0.0], [2.0]], [[4.0], [0.0]]))
        >>> found = NearestSolver().solve(BarycenterProblem(measures, (0.5, 0.5), size=2))
        >>> found.measure.support.tolist(), found.cost
        ([[0.0], [3.0]], 0.5)
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    measure: ClassVar[str] = "weights"
    refines: ClassVar[bool] = False
    own_options: ClassVar[frozenset[str]] = frozenset()

    scope: Scope = Scope.INCOMING
    start: Start = Start.NOTHING
    wants_structure: bool = False
    uses_signs: bool = False
    uses_rotations: bool = False
    tries_nothing: bool = False
    is_order_random: bool = False
    is_settled: bool = False
    max_sweeps: Annotated[int, Ge(0), Le(MOST_STEPS)] = 1
    members: Literal["all", "first"] = "all"
    scaling: Literal["density", "paper"] = "density"
    has_free_masses: bool = False
    structure_weight: Annotated[float, Ge(0)] = 1.0

    def __post_init__(self) -> None:
        """Checks the options; a subclass that has more to do calls it first.

        Raises:
            RecipeError: An option is not what its annotation says.
        """
        self.check_options()

    @final
    def check_options(self) -> None:
        """Checks the options, and what the engine asks of a solver.

        Raises:
            RecipeError: One is not what its annotation says.
        """
        check_options(self, AbstractBarycenterSolver)

    def __init_subclass__(cls, **options: object) -> None:
        """Refuses a subclass that overrides `solve`.

        Raises:
            PluginError: It does.
        """
        super().__init_subclass__(**options)
        if "solve" in vars(cls):
            raise PluginError(
                f"The solver {cls.__qualname__} overrides solve, which is final: it checks what a solver finds and "
                "does what all solvers must. Write find(problem) instead, which returns one coupling per source."
            )

    @abc.abstractmethod
    def find(self, problem: BarycenterProblem) -> Sequence[Coupling] | Solution:
        """Returns one coupling per source, in any order of the fused neurons.

        Every number of the measures is finite, and at least one model weight is positive.

        Raises:
            SolverError: The solver cannot treat this kind of problem.
        """

    @final
    def solve(self, problem: BarycenterProblem) -> Barycenter:
        """Returns the barycenter of the problem's measures.

        Raises:
            SolverError: The solver cannot treat this kind of problem, or what it found breaks its contract.
        """
        failure = unsolved(problem)
        if failure is not None:
            return failure
        if not problem.counting:
            raise SolverError(
                "No source has a positive model weight, so there is nothing to fuse. Give weights that sum to one."
            )
        scaled = Scaled.of(problem)
        if scaled.problem is problem:
            return self._solved(problem)
        restored = _restored(problem, scaled, self._solved(scaled.problem))
        _check_cost(self.name, restored.cost)
        return restored

    def _solved(self, problem: BarycenterProblem) -> Barycenter:
        """Returns the barycenter of finite measures whose squares are finite as well."""
        before = MeasureWatch(problem.measures)
        with blaming(self, f"Solver '{self.name}' on {_group(problem)}", SolverError):
            found = self.find(problem)
        solution = _solution(self.name, problem, found)
        for place in before.changed():
            raise SolverError(
                f"Solver '{self.name}' writes to what it is given for {_group(problem)}: the measure of source "
                f"{place} was changed in place. Let it work on copies."
            )
        _check_sizes(self.name, problem, solution.couplings)
        _check_marginals(self, problem, solution.couplings)
        barycenter = _barycenter(problem, solution, solution.couplings)
        _check_cost(self.name, barycenter.cost)
        return _settled(problem, solution, barycenter)


def _restored(problem: BarycenterProblem, scaled: Scaled, found: Barycenter) -> Barycenter:
    """Returns what was found at another scale, in the numbers of the problem itself."""
    couplings = tuple(
        coupling.to(at_least_single(measure.support))
        for coupling, measure in zip(found.couplings, problem.measures, strict=True)
    )
    stats = {**found.stats, "objective": [scaled.cost(cost) for cost in found.stats["objective"]]}
    return Barycenter(fused_measure(problem, couplings), couplings, scaled.cost(found.cost), found.status, stats)


def _solution(name: str, problem: BarycenterProblem, found: object) -> Solution:
    """Returns what a solver found, where it is what solvers return.

    Raises:
        SolverError: It is something else.
    """
    couplings = found.couplings if isinstance(found, Solution) else found
    if isinstance(couplings, Sequence) and all(isinstance(coupling, Coupling) for coupling in couplings):
        return found if isinstance(found, Solution) else Solution(tuple(couplings))
    raise SolverError(
        f"Solver '{name}' returned a {type(found).__name__} for {_group(problem)}, and not one Coupling per source or "
        "a Solution. Check it with mergekit_ot.testing.check_solver."
    )


def _barycenter(problem: BarycenterProblem, solution: Solution, couplings: tuple[Coupling, ...]) -> Barycenter:
    measure = fused_measure(problem, couplings)
    if solution.objective is None:
        cost = barycenter_cost(problem, couplings, measure.support)
    else:
        cost = solution.objective(couplings)
    return Barycenter(measure, couplings, cost, solution.status, {"objective": [cost], **solution.stats})


def _settled(problem: BarycenterProblem, solution: Solution, found: Barycenter) -> Barycenter:
    """Returns what was found, in the order of one source, or what is in force if it costs no more."""
    if problem.initial is not None:
        in_force = _barycenter(problem, replace(solution, status=Status.CONVERGED, stats={}), problem.initial)
        room = rounding_error(problem)
        is_new = found.cost <= in_force.cost + room and _differs_in_weightless(problem, in_force, found)
        if in_force.cost <= found.cost + room and not is_new:
            return replace(in_force, stats={**solution.stats, **in_force.stats})
    reference = problem.counting[0] if solution.reference is None else solution.reference
    couplings = in_order_of(found.couplings, reference)
    if all(new is old for new, old in zip(couplings, found.couplings, strict=True)):
        return found
    return replace(found, couplings=couplings, measure=fused_measure(problem, couplings))


def _differs_in_weightless(problem: BarycenterProblem, in_force: Barycenter, found: Barycenter) -> bool:
    """Whether there are sources of no weight, and the others are coupled with each other as they are already."""
    if len(problem.counting) == len(problem.measures):
        return False
    before, after = (in_order_of(ended.couplings, problem.counting[0]) for ended in (in_force, found))
    return all(after[place].is_same(before[place]) for place in problem.counting)


def _check_sizes(name: str, problem: BarycenterProblem, couplings: Sequence[Coupling]) -> None:
    wanted = [(problem.size, measure.size) for measure in problem.measures]
    sizes = [(coupling.target_size, coupling.source_size) for coupling in couplings]
    if sizes != wanted:
        raise SolverError(
            f"Solver '{name}' returned couplings of sizes {sizes} for {_group(problem)}, which needs {wanted} "
            "(fused, source). Check it with mergekit_ot.testing.check_solver."
        )


def _check_marginals(
    solver: AbstractBarycenterSolver, problem: BarycenterProblem, couplings: Sequence[Coupling]
) -> None:
    name, is_free = solver.name, solver.has_free_masses
    for place, (coupling, measure) in enumerate(zip(couplings, problem.measures, strict=True)):
        flaw = coupling.flaw()
        if flaw:
            raise SolverError(
                f"Solver '{name}' returned a coupling of {_group(problem)} with source {place} that is none: {flaw}. "
                "Check it with mergekit_ot.testing.check_solver."
            )
        error = _marginal_error(coupling, measure, is_free)
        if error <= _MARGINAL_TOLERANCE:
            continue
        # Masses may have changed since the couplings in force were found: what builds on those may miss them as well.
        before = 0.0 if problem.initial is None else _marginal_error(problem.initial[place], measure, is_free)
        if not error <= before + _MARGINAL_TOLERANCE:
            raise SolverError(
                f"Solver '{name}' returned a coupling of {_group(problem)} with source {place} that misses its "
                f"marginals by {error:.2g}: fused neurons with a partner there share its mass evenly, and each of its "
                "neurons gives its own mass. Check it with mergekit_ot.testing.check_solver."
            )


def _check_cost(name: str, cost: float) -> None:
    if not math.isfinite(cost):
        raise SolverError(
            f"Solver '{name}' found couplings of cost {cost}, though every weight is finite. {Status.NONFINITE.value}"
        )


def _group(problem: BarycenterProblem) -> str:
    return f"group '{problem.group}'" if problem.group else "the group"


def _marginal_error(coupling: Coupling, measure: NeuronMeasure, is_free: bool) -> float:
    if coupling.is_permutation or is_free:
        return float((coupling.source_marginal(measure.mass) - measure.mass).abs().max()) if measure.size else 0.0
    here = coupling.presence(measure.mass)
    # Neurons of another source that are kept apart have no partner in this one; the others share its mass.
    mass = uniform_mass(coupling.target_size, measure.mass) if here is None else here / here.sum()
    errors = (coupling.target_marginal(measure.mass) - mass, coupling.source_marginal(measure.mass) - measure.mass)
    return max((float(error.abs().max()) for error in errors if error.numel()), default=0.0)
