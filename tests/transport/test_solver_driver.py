"""What `solve` does for every solver, whatever it finds: laws over solvers that find couplings at random."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_ot import (
    AbstractBarycenterSolver,
    BarycenterProblem,
    Coupling,
    Permutation,
    Plan,
    Solution,
    SolverError,
    Status,
    barycenter_cost,
    fused_measure,
    in_order_of,
    independent_coupling,
    rounding_error,
    uniform_mass,
)
from mergekit_ot.errors import PluginError
from mergekit_ot.testing import random_problem

LAW = settings(deadline=None, max_examples=50)
SEEDS = st.integers(0, 10_000)
COUNTS = st.integers(1, 4)


@dataclass(frozen=True, eq=False)
class Given(AbstractBarycenterSolver):
    """Finds what it is given."""

    found: object = None
    name = "given"

    def find(self, problem: BarycenterProblem) -> Sequence[Coupling] | Solution:
        return self.found  # type: ignore[return-value]


def random_couplings(count: int, size: int, seed: int) -> tuple[Coupling, ...]:
    """Permutations, and mixtures of two: all have uniform marginals."""
    generator = torch.Generator().manual_seed(seed)

    def permutation() -> Permutation:
        return Permutation(torch.randperm(size, generator=generator))

    def mixture() -> Plan:
        like = torch.empty(0, dtype=torch.float64)
        return Plan((permutation().transport_plan(like) + permutation().transport_plan(like)) / 2)

    is_soft = torch.rand(count, generator=generator) < 0.3
    return tuple(mixture() if soft else permutation() for soft in is_soft.tolist())


def random_weights(count: int, seed: int) -> list[float]:
    """Some of them zero, never all."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(count, generator=generator).double() * (torch.rand(count, generator=generator) < 0.7)
    weights[seed % count] += 0.5
    return (weights / weights.sum()).tolist()


def cost_of(problem: BarycenterProblem, couplings: Sequence[Coupling]) -> float:
    return barycenter_cost(problem, couplings, fused_measure(problem, couplings).support)


@LAW
@given(COUNTS, st.integers(1, 6), SEEDS)
def test_what_follows_from_couplings_is_worked_out(count: int, size: int, seed: int) -> None:
    problem = random_problem((size,) * count, model_weights=random_weights(count, seed), seed=seed, slices=seed % 2)
    found = random_couplings(count, size, seed + 1)
    for given_as in (found, list(found), Solution(found)):
        solved = Given(given_as).solve(problem)
        assert solved.cost == cost_of(problem, found)
        first = problem.counting[0]
        expected = in_order_of(found, first)
        assert all(ours.is_same(theirs) for ours, theirs in zip(solved.couplings, expected, strict=True))
        assert solved.couplings[first].is_identity == found[first].is_permutation
        torch.testing.assert_close(solved.measure.support, fused_measure(problem, expected).support, rtol=0, atol=0)
        assert solved.status is Status.CONVERGED
        assert solved.stats["objective"] == [solved.cost]


@LAW
@given(COUNTS, st.integers(1, 6), st.booleans(), SEEDS)
def test_nothing_is_worse_than_what_is_in_force(count: int, size: int, is_other: bool, seed: int) -> None:
    problem = random_problem((size,) * count, model_weights=random_weights(count, seed), seed=seed)
    target = problem.measures[0].support.roll(1, 0)
    found, initial = random_couplings(count, size, seed + 1), random_couplings(count, size, seed + 2)

    def distance(couplings: Sequence[Coupling]) -> float:
        return barycenter_cost(problem, couplings, target)

    objective = distance if is_other else None
    cost: Callable[[Sequence[Coupling]], float] = distance if is_other else lambda c: cost_of(problem, c)
    solved = Given(Solution(found, Status.MAX_STEPS, {"steps": 3}, objective)).solve(replace(problem, initial=initial))
    room = rounding_error(problem)
    assert solved.stats["steps"] == 3
    is_kept = solved.couplings is initial
    # Sources of no weight may be coupled anew where nothing that counts changes, and so at the same cost.
    assert is_kept or solved.cost <= cost(initial) + room
    if len(problem.counting) == count:
        assert is_kept == (cost(initial) <= cost(found) + room)
    assert solved.cost == cost(initial if is_kept else found)
    assert solved.status is (Status.CONVERGED if is_kept else Status.MAX_STEPS)
    torch.testing.assert_close(solved.measure.support, fused_measure(problem, solved.couplings).support)


def test_a_solver_may_name_the_source_that_gives_the_order() -> None:
    problem, found = random_problem((5,) * 3), tuple(Permutation(torch.arange(5).roll(shift)) for shift in (1, 2, 3))
    for reference in (None, 0, 1, 2):
        solved = Given(Solution(found, reference=reference)).solve(problem)
        assert [coupling.is_identity for coupling in solved.couplings].index(True) == (reference or 0)
        torch.testing.assert_close(solved.measure.support, fused_measure(problem, solved.couplings).support)


def test_what_is_in_force_stays_where_it_costs_the_same() -> None:
    problem = random_problem((5, 5, 5))
    initial = random_couplings(3, 5, 0)
    turned = tuple(coupling.in_order(torch.arange(5).roll(2)) for coupling in initial)
    solved = Given(turned).solve(replace(problem, initial=initial))
    assert solved.couplings is initial


def test_a_source_of_no_weight_is_coupled_anew_where_nothing_that_counts_changes() -> None:
    problem = random_problem((5, 5, 5), model_weights=(0.5, 0.5, 0.0))
    same, other = Permutation.identity(5), Permutation(torch.arange(5).roll(1))
    solved = Given((same, other, other)).solve(replace(problem, initial=(same, other, same)))
    assert all(ours.is_same(theirs) for ours, theirs in zip(solved.couplings, (same, other, other), strict=True))
    assert not other.is_same(same)


def test_what_is_not_finite_never_reaches_a_solver() -> None:
    problem = random_problem((3, 3))
    problem.measures[1].support[0, 0] = torch.nan
    assert Given(None).solve(problem).status is Status.NONFINITE


def test_weights_that_are_all_zero_are_refused() -> None:
    with pytest.raises(SolverError, match="No source has a positive model weight"):
        Given(()).solve(random_problem((3, 3), model_weights=(0.0, 0.0)))


def test_a_cost_that_is_not_finite_is_refused() -> None:
    problem = random_problem((3, 3))
    problem.measures[1].support[0, 0] = 1e300
    with pytest.raises(SolverError, match=r"'given' found couplings of cost inf.*not finite"):
        Given(random_couplings(2, 3, 0)).solve(problem)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ((Permutation.identity(3),), r"sizes \[\(3, 3\)\] for group 'fc', which needs \[\(3, 3\), \(3, 4\)\]"),
        ((Permutation.identity(3),) * 2, r"sizes \[\(3, 3\), \(3, 3\)\] for group 'fc'"),
        ((Permutation.identity(3), Plan(torch.eye(3, 4) / 3)), "group 'fc' with source 1 that misses its marginals by"),
        ((Permutation.identity(3), Plan(torch.full((3, 4), 0.1))), "misses its marginals by 0.067"),
        ((Permutation.identity(3), Plan(torch.full((3, 4), torch.nan))), "misses its marginals by nan"),
    ],
)
def test_couplings_that_break_the_contract_are_refused(found: tuple[Coupling, ...], message: str) -> None:
    problem = replace(random_problem((3, 4)), group="fc")
    with pytest.raises(SolverError, match=message) as raised:
        Given(found).solve(problem)
    assert "Solver 'given'" in str(raised.value)
    assert "check_solver" in str(raised.value)


def test_masses_that_have_changed_since_are_no_fault_of_the_solver() -> None:
    problem = random_problem((3, 3))
    mass = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    problem = replace(problem, measures=(problem.measures[0], replace(problem.measures[1], mass=mass)))
    stale = (Permutation.identity(3),) * 2
    with pytest.raises(SolverError, match="misses its marginals"):
        Given(stale).solve(problem)
    solved = Given(stale).solve(replace(problem, initial=stale))
    assert all(coupling.is_identity for coupling in solved.couplings)
    right = (stale[0], independent_coupling(uniform_mass(3, mass), mass))
    assert Given(right).solve(problem).couplings[1] is right[1]


def test_solve_cannot_be_overridden() -> None:
    with pytest.raises(PluginError, match=r"Older overrides solve, which is final.*Write find\(problem\) instead"):

        class Older(AbstractBarycenterSolver):
            name = "older"

            def solve(self, problem):  # type: ignore[override]
                return None

            def find(self, problem):
                return ()
