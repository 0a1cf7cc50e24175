"""`check_solver` passes a right solver, and each clause of it fails a solver that breaks that clause alone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from mergekit_ot.errors import SolverError
from mergekit_ot.testing import check_solver, random_problem
from mergekit_ot.testing.problems import best_permutations
from mergekit_ot.transport.barycenter import barycenter_cost, fused_measure, independent_coupling
from mergekit_ot.transport.coupling import Coupling
from mergekit_ot.transport.ground_cost import couple, ground_cost
from mergekit_ot.transport.permutation import Permutation
from mergekit_ot.transport.plan import Plan
from mergekit_ot.transport.problem import BarycenterProblem, Solution
from mergekit_ot.transport.solver import AbstractBarycenterSolver


@dataclass(frozen=True)
class Aligned(AbstractBarycenterSolver):
    """Couples every source with the first: the least that satisfies the contract."""

    name: ClassVar[str] = "aligned"

    def find(self, problem: BarycenterProblem) -> Solution | tuple[Coupling, ...]:
        return self.couplings(problem)

    def couplings(self, problem: BarycenterProblem) -> tuple[Coupling, ...]:
        first = problem.measures[0]
        if problem.size != first.size:
            raise SolverError("the first source must have the fused group's size")
        return tuple(
            couple(ground_cost(first.support, measure.support), first.mass, measure.mass)
            for measure in problem.measures
        )


class LosesACoupling(Aligned):
    def couplings(self, problem):
        return super().couplings(problem)[:1]


class HasNoCost(Aligned):
    def find(self, problem):
        return Solution(self.couplings(problem), objective=lambda couplings: float("nan"))


class Refuses(Aligned):
    def find(self, problem):
        raise SolverError("not today")


class Rolls(Aligned):
    def couplings(self, problem):
        return tuple(Plan(each.transport_plan().roll(1, 0)) for each in super().couplings(problem))


class NeverAligns(Aligned):
    def couplings(self, problem):
        return tuple(
            Permutation.identity(problem.size) if measure.size == problem.size else coupling
            for measure, coupling in zip(problem.measures, super().couplings(problem), strict=True)
        )


class MissesMarginals(Aligned):
    def couplings(self, problem):
        found = super().couplings(problem)
        if all(coupling.is_permutation for coupling in found):
            return found
        like = problem.measures[0].mass
        nearest = [
            torch.nn.functional.one_hot(each.transport_plan(like).argmax(1), each.source_size).to(like) / problem.size
            for each in found
        ]
        return tuple(Plan(plan) for plan in nearest)


class WritesIntoItsInput(Aligned):
    def find(self, problem):
        found = self.couplings(problem)
        if problem.initial is not None:
            problem.measures[-1].support.mul_(2)
        return found


class WritesIntoCouplings(Aligned):
    def find(self, problem):
        if problem.initial is not None:
            problem.initial[1].index.copy_(torch.arange(problem.size))
        return self.couplings(problem)


class GivesDoublePlans(Aligned):
    def couplings(self, problem):
        return tuple(Plan(each.transport_plan().double()) for each in super().couplings(problem))


class IsRandom(Aligned):
    """Two sources are coupled as ever, so that no other clause is broken."""

    def couplings(self, problem):
        found = super().couplings(problem)
        return tuple(Permutation(torch.randperm(7)) if place > 1 else each for place, each in enumerate(found))


class WorsensByChance(Aligned):
    """What it minimises depends on the seed."""

    def find(self, problem):
        return Solution(
            self.couplings(problem), objective=lambda couplings: objective_of(problem, couplings) + problem.seed % 2
        )


class IgnoresTheInitial(Aligned):
    """Its objective is that of what it found, whatever it is asked about, so only a better start shows it."""

    def find(self, problem):
        found = self.couplings(problem)
        return Solution(found, objective=lambda couplings: objective_of(problem, found))


class AlignsTwoOnly(Aligned):
    """Ignores what is in force too, under another objective: the distance to the first source."""

    def couplings(self, problem):
        found = super().couplings(problem)
        return tuple(
            Permutation.identity(problem.size) if place > 1 and each.is_permutation else each
            for place, each in enumerate(found)
        )

    def find(self, problem):
        found = self.couplings(problem)
        cost = barycenter_cost(problem, found, problem.measures[0].support)
        return Solution(found, objective=lambda couplings: cost)


class TakesZeroForMissing(Aligned):
    """Blends the source that has all the weight with itself, as if the others had some."""

    def couplings(self, problem):
        found = super().couplings(problem)
        if max(problem.model_weights) < 1 or len(found) < 3:
            return found
        mass = problem.measures[0].mass
        return (independent_coupling(mass, mass),) * len(found)


class IsDeafToStructure(Aligned):
    wants_structure: ClassVar[bool] = True


def test_a_right_solver_passes():
    check_solver(Aligned())


@pytest.mark.parametrize(
    ("broken", "clause"),
    [
        (LosesACoupling, "one coupling per source"),
        (HasNoCost, "a finite cost"),
        (Refuses, "the solver refused: not today"),
        (Rolls, "Identical measures give identity"),
        (NeverAligns, "was permuted|were permuted"),
        (MissesMarginals, "misses its marginals"),
        (WritesIntoItsInput, "the measure of source 2 was changed in place"),
        (WritesIntoCouplings, "couplings in force were changed in place"),
        (GivesDoublePlans, "a coupling is torch.float64"),
        (IsRandom, "same seed gives the same result"),
        (WorsensByChance, "never exceeds that of the couplings in force"),
        (IgnoresTheInitial, "from couplings of cost .*, the least possible, the solver went to"),
        (AlignsTwoOnly, "from couplings of cost 0 the solver went to"),
        (TakesZeroForMissing, "with all weight on source"),
        (IsDeafToStructure, "not recovered from its structure"),
    ],
)
def test_each_clause_fails_the_solver_that_breaks_it(broken, clause):
    with pytest.raises(SolverError, match=clause) as raised:
        check_solver(broken())
    assert "'aligned' breaks its contract" in str(raised.value)


def test_a_solver_that_never_aligns_passes_when_it_says_so():
    class SaysSo(NeverAligns):
        max_sweeps: ClassVar[int] = 0

    check_solver(SaysSo())


def test_random_problems_are_reproducible_and_as_asked():
    problem = random_problem((3, 5), size=4, dimension=2, slices=3, dtype=torch.float32, seed=9)
    again = random_problem((3, 5), size=4, dimension=2, slices=3, dtype=torch.float32, seed=9)
    other = random_problem((3, 5), size=4, dimension=2, slices=3, dtype=torch.float32, seed=10)
    assert [measure.size for measure in problem.measures] == [3, 5]
    assert problem.size == 4
    assert problem.measures[1].structure.shape == (3, 5, 5)
    assert problem.model_weights == (0.5, 0.5)
    assert torch.equal(problem.measures[0].support, again.measures[0].support)
    assert not torch.equal(problem.measures[0].support, other.measures[0].support)


def objective_of(problem, couplings):
    return barycenter_cost(problem, couplings, fused_measure(problem, couplings).support)


@pytest.mark.parametrize("sizes", [(4, 4), (3, 3, 3), (3, 3, 3, 3)])
@pytest.mark.parametrize("weights", ["equal", "unequal"])
def test_the_best_permutations_are_the_best_of_all(sizes, weights):
    given = [place + 1.0 for place in range(len(sizes))]
    model_weights = None if weights == "equal" else [weight / sum(given) for weight in given]
    problem = random_problem(sizes, dimension=2, model_weights=model_weights, seed=4)
    orders = [Permutation(torch.tensor(order)) for order in itertools.permutations(range(problem.size))]
    tried = itertools.product([Permutation.identity(problem.size)], *[orders] * (len(sizes) - 1))
    least = min(objective_of(problem, couplings) for couplings in tried)
    assert objective_of(problem, best_permutations(problem)) == pytest.approx(least, rel=1e-9)
