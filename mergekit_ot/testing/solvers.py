"""The contract of solvers, clause by clause."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch

from mergekit_ot.errors import SolverError
from mergekit_ot.testing.clauses import Contract
from mergekit_ot.testing.problems import SIZE as _SIZE
from mergekit_ot.testing.problems import best_permutations, permuted, random_problem
from mergekit_ot.transport.barycenter import barycenter_cost, fused_measure
from mergekit_ot.transport.coupling import Coupling
from mergekit_ot.transport.measure import NeuronMeasure
from mergekit_ot.transport.permutation import Permutation
from mergekit_ot.transport.problem import BarycenterProblem
from mergekit_ot.transport.solver import AbstractBarycenterSolver

_TOLERANCE = 1e-5
# Four sources of five neurons: small enough to try all permutations, and a local search rarely finds the best.
_TRIED = (5,) * 4
_TRIALS = 4


def check_solver(solver: AbstractBarycenterSolver, device: torch.device | str = "cpu", seed: int = 0) -> None:
    """Checks a solver against the contract stated in `AbstractBarycenterSolver`.

    A solver that is never asked to align (``max_sweeps`` 0) need not follow permuted rows; sizes that differ may be
    refused with a `SolverError`; supports without columns are tried only where ``wants_structure``.

    Args:
        solver: The solver, with the options to check.
        device: Device of the problems.
        seed: Seed of the problems.

    Raises:
        SolverError: A clause is broken; the message says which.

    Example:
        >>> from mergekit_ot import default_manager
        >>> check_solver(default_manager().get("solver", "average")())
    """
    advice = "Correct the solver; the clauses are listed in AbstractBarycenterSolver."
    contract = Contract(f"Solver '{solver.name}'", advice, SolverError, _refused)
    for clause in _CLAUSES:
        for slices in (0, 2) if solver.wants_structure else (0,):
            contract.check(clause, solver, _Given(slices, device, seed))


def _refused(error: Exception) -> str | None:
    return f"the solver refused: {error}" if isinstance(error, SolverError) else None


class _Given:
    """Problems that differ by what a clause asks for, and share what the check asks for."""

    def __init__(self, slices: int, device: torch.device | str, seed: int) -> None:
        self.slices, self.device, self.seed = slices, device, seed

    def problem(self, sizes: Sequence[int] = (_SIZE, _SIZE), **options: object) -> BarycenterProblem:
        """Returns a random problem on the device of the check."""
        given = {"slices": self.slices, "device": self.device, "seed": self.seed, **options}
        return random_problem(sizes, **given)  # type: ignore[arg-type]

    def order(self, size: int = _SIZE) -> torch.Tensor:
        """Returns a permutation that moves every neuron."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        cycle = torch.randperm(size, generator=generator)
        order = torch.empty_like(cycle)
        order[cycle] = cycle.roll(1)
        return order.to(self.device)


def _result_is_complete(solver: AbstractBarycenterSolver, given: _Given) -> str:
    """The result has one coupling per source, a measure of the fused size and a finite cost."""
    for sizes in ((_SIZE,), (_SIZE, _SIZE), (_SIZE,) * 3):
        # What is missing is told by solve itself.
        solver.solve(given.problem(sizes))
    return ""


def _identical_measures_stay(solver: AbstractBarycenterSolver, given: _Given) -> str:
    """Identical measures give identity couplings."""
    problem = given.problem()
    found = solver.solve(replace(problem, measures=problem.measures[:1] * 2))
    for place, coupling in enumerate(found.couplings):
        distance = _difference(coupling.average_map(problem.measures[0].mass), _identity(problem))
        # An entropic plan is never exactly the identity, but near it.
        if distance > 0.05:
            return f"coupling {place} is {distance:.2g} away from the identity"
    return ""


def _permuted_rows_follow(solver: AbstractBarycenterSolver, given: _Given) -> str:
    """Permuting a source's rows permutes its plan, and recovers the order from a permuted copy."""
    if solver.max_sweeps == 0:
        return ""
    order = given.order()
    problem = given.problem()
    moved = replace(problem, measures=(problem.measures[0], permuted(problem.measures[1], order)))
    plan, moved_plan = (
        solver.solve(each).couplings[1].transport_plan(each.measures[0].mass) for each in (problem, moved)
    )
    if _difference(plan[:, order], moved_plan) > _TOLERANCE / _SIZE:
        return "the plan of a source whose rows were permuted is not the permuted plan"
    copy = replace(problem, measures=(problem.measures[0], permuted(problem.measures[0], order)))
    recovered = solver.solve(copy).couplings[1].average_map(problem.measures[0].mass)
    if _difference(recovered[:, torch.argsort(order)], _identity(problem)) > 0.05:
        return "the order of a permuted copy was not recovered"
    return ""


def _marginals_are_right(solver: AbstractBarycenterSolver, given: _Given) -> str:
    """Every plan is non-negative and has the masses of source and fused group (0 where there is no partner)."""
    for sizes, size in (((_SIZE, _SIZE, _SIZE), _SIZE), ((6, 9), 6), ((9, 6), 9), ((5, 8), 7)):
        problem = given.problem(sizes, size=size)
        if not _is_taken(solver, problem):
            continue
        for place, (coupling, measure) in enumerate(
            zip(solver.solve(problem).couplings, problem.measures, strict=True)
        ):
            if float(coupling.transport_plan(measure.mass).min()) < 0:
                return f"coupling {place} of sizes {sizes} to {size} holds negative mass"
    return ""


def _is_taken(solver: AbstractBarycenterSolver, problem: BarycenterProblem) -> bool:
    """Whether a solver takes a problem; sizes that differ may be refused, equal ones may not."""
    try:
        solver.find(problem)
    except SolverError:
        if problem.fitting == tuple(range(len(problem.measures))):
            raise
        return False
    return True


def _inputs_stay_untouched(solver: AbstractBarycenterSolver, given: _Given) -> str:
    """Inputs stay untouched."""
    problem = given.problem((_SIZE,) * 3)
    initial = _in_force(problem, given)
    plans = [coupling.transport_plan().clone() for coupling in initial]
    before = [_copy(measure) for measure in problem.measures]
    solver.solve(replace(problem, initial=initial))
    for place, (old, new) in enumerate(zip(before, problem.measures, strict=True)):
        if any(not torch.equal(*pair) for pair in zip(_tensors(old), _tensors(new), strict=True)):
            return f"the measure of source {place} was changed in place"
    if any(not torch.equal(plan, coupling.transport_plan()) for plan, coupling in zip(plans, initial, strict=True)):
        return "the couplings in force were changed in place"
    return ""


def _dtype_and_device_are_kept(solver: AbstractBarycenterSolver, given: _Given) -> str:
    """Dtype and device are kept."""
    for dtype in (torch.float32, torch.float64):
        problem = given.problem(dtype=dtype)
        found = solver.solve(problem)
        device = problem.measures[0].support.device
        for tensor in itertools.chain.from_iterable(coupling.tensors for coupling in found.couplings):
            if tensor.device != device or (tensor.is_floating_point() and tensor.dtype != dtype):
                return f"a coupling is {tensor.dtype} on {tensor.device}, the inputs are {dtype} on {device}"
    return ""


def _same_seed_same_result(solver: AbstractBarycenterSolver, given: _Given) -> str:
    """The same problem with the same seed gives the same result."""
    for sizes, size in (((_SIZE,) * 3, _SIZE), ((5, 8), 7)):
        problem = given.problem(sizes, size=size)
        if not _is_taken(solver, problem):
            continue
        first, second = solver.solve(problem), solver.solve(problem)
        if first.cost != second.cost or not torch.equal(first.measure.support, second.measure.support):
            return f"two solves cost {first.cost} and {second.cost}, or differ in their supports"
    return ""


def _initial_is_never_worsened(solver: AbstractBarycenterSolver, given: _Given) -> str:
    """The cost never exceeds that of the couplings in force."""
    for sizes in ((_SIZE, _SIZE), (_SIZE,) * 3):
        problem = given.problem(sizes)
        found = solver.solve(replace(problem, initial=_in_force(problem, given)))
        again = solver.solve(replace(problem, initial=found.couplings, seed=problem.seed + 1))
        if again.cost > found.cost * (1 + _TOLERANCE) + _TOLERANCE:
            return f"from couplings of cost {found.cost:.6g} the solver went to {again.cost:.6g}"
    return ""


def _better_initial_is_used(solver: AbstractBarycenterSolver, given: _Given) -> str:
    """Couplings in force that are better than the solver's own are not lost."""
    if solver.max_sweeps == 0 or given.slices:
        return ""
    for trial in range(_TRIALS):
        problem = given.problem(_TRIED, dimension=3, seed=given.seed + trial)
        alone = solver.solve(problem)
        if not _is_close(alone.cost, _free_cost(problem, alone.couplings)):
            # Another objective than that of a free support, for which the best couplings are not known here.
            return ""
        best = best_permutations(problem)
        cost = _free_cost(problem, best)
        found = solver.solve(replace(problem, initial=best))
        if found.cost > cost and not _is_close(found.cost, cost):
            return f"from couplings of cost {cost:.6g}, the least possible, the solver went to {found.cost:.6g}"
    return ""


def _planted_initial_is_used(solver: AbstractBarycenterSolver, given: _Given) -> str:
    """Couplings in force under which all sources are the same neuron by neuron, at no cost, are not lost."""
    if solver.max_sweeps == 0:
        return ""
    problem, order = given.problem((_SIZE,) * 3), given.order()
    copies = (problem.measures[0], *(permuted(problem.measures[0], each) for each in (order, order.roll(1))))
    planted = tuple(Permutation(torch.argsort(each)) for each in (order.sort().values, order, order.roll(1)))
    found = solver.solve(replace(problem, measures=copies, initial=planted))
    return "" if abs(found.cost) <= _TOLERANCE else f"from couplings of cost 0 the solver went to {found.cost:.6g}"


def _one_hot_weights_return_the_source(solver: AbstractBarycenterSolver, given: _Given) -> str:
    """Model weights of one and zero return that source, up to the order of its neurons."""
    for chosen in range(3):
        weights = [float(place == chosen) for place in range(3)]
        problem = given.problem((_SIZE,) * 3, model_weights=weights)
        found = solver.solve(problem)
        coupling = found.couplings[chosen]
        index = coupling.partners()
        if not coupling.is_permutation or not torch.equal(
            index.sort().values, torch.arange(_SIZE, device=index.device)
        ):
            return f"with all weight on source {chosen}, its coupling is not a permutation"
        distance = _difference(found.measure.support, problem.measures[chosen].support[index])
        if distance > _TOLERANCE:
            return f"with all weight on source {chosen}, the support is {distance:.2g} away from it"
    return ""


def _structure_speaks_alone(solver: AbstractBarycenterSolver, given: _Given) -> str:
    """A solver that wants structure aligns supports that have no columns."""
    if not solver.wants_structure or not given.slices:
        return ""
    order = given.order()
    problem = given.problem(dimension=0)
    copy = replace(problem, measures=(problem.measures[0], permuted(problem.measures[0], order)))
    recovered = solver.solve(copy).couplings[1].average_map(problem.measures[0].mass)
    if _difference(recovered[:, torch.argsort(order)], _identity(problem)) > 0.05:
        return "the order of a permuted copy was not recovered from its structure"
    return ""


_CLAUSES = (
    _result_is_complete,
    _identical_measures_stay,
    _permuted_rows_follow,
    _marginals_are_right,
    _inputs_stay_untouched,
    _dtype_and_device_are_kept,
    _same_seed_same_result,
    _initial_is_never_worsened,
    _better_initial_is_used,
    _planted_initial_is_used,
    _one_hot_weights_return_the_source,
    _structure_speaks_alone,
)


def _in_force(problem: BarycenterProblem, given: _Given) -> tuple[Coupling, ...]:
    return tuple(
        Permutation(given.order() if place else torch.arange(_SIZE, device=given.device))
        for place in range(len(problem.measures))
    )


def _free_cost(problem: BarycenterProblem, couplings: Sequence[Coupling]) -> float:
    """Returns the objective of couplings when the support is the best one for them."""
    return barycenter_cost(problem, couplings, fused_measure(problem, couplings).support)


def _is_close(first: float, second: float) -> bool:
    return abs(first - second) <= _TOLERANCE * (1 + abs(second))


def _identity(problem: BarycenterProblem) -> torch.Tensor:
    mass = problem.measures[0].mass
    return torch.eye(problem.size, dtype=mass.dtype, device=mass.device)


def _difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max()) if first.shape == second.shape else float("inf")


def _tensors(measure: NeuronMeasure) -> list[torch.Tensor]:
    return [tensor for tensor in (measure.support, measure.mass, measure.structure) if tensor is not None]


def _copy(measure: NeuronMeasure) -> NeuronMeasure:
    structure = None if measure.structure is None else measure.structure.clone()
    return NeuronMeasure(measure.support.clone(), measure.mass.clone(), structure, measure.signs)
