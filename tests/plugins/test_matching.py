"""Weight matching, activation matching and vanilla averaging: laws, brute force, examples."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import mergeot_matching.solver as solver_module
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergeot_matching import mergeot_solvers
from mergeot_matching.average import AverageSolver
from mergeot_matching.solver import ActivationMatchingSolver, WeightMatchingSolver

from mergekit_ot import Permutation
from mergekit_ot.errors import MergeotError, SolverError
from mergekit_ot.testing import check_solver, permuted, random_problem
from mergekit_ot.transport.barycenter import barycenter_cost, fused_measure
from mergekit_ot.transport.ground_cost import couple, ground_cost
from mergekit_ot.transport.measure import NeuronMeasure
from mergekit_ot.transport.problem import BarycenterProblem, Status
from mergekit_ot.transport.solver import Scope, Start

LAW = settings(deadline=None, max_examples=40)
SEEDS = st.integers(0, 10_000)
SOLVERS = [WeightMatchingSolver(), ActivationMatchingSolver()]


@pytest.mark.parametrize("solver", [*SOLVERS, AverageSolver()])
def test_contract(solver):
    check_solver(solver)


def test_the_methods_differ_in_what_a_neuron_is_seen_by_and_in_sweeps():
    assert set(mergeot_solvers()) == {"weight-matching", "activation-matching", "zip", "average"}
    weights, activations = WeightMatchingSolver, ActivationMatchingSolver
    assert (weights.scope, weights.start, weights.max_sweeps) == (Scope.INCIDENT, Start.IDENTITY, 100)
    assert (activations.scope, activations.start, activations.max_sweeps) == (Scope.INCOMING, Start.NOTHING, 1)
    assert (weights.measure, activations.measure) == ("weights", "activations")
    assert (AverageSolver.start, AverageSolver.max_sweeps) == (Start.IDENTITY, 0)


@LAW
@given(st.integers(1, 5), SEEDS)
def test_two_sources_reach_the_optimum_over_all_permutations(size, seed):
    problem = random_problem((size, size), dimension=3, seed=seed, model_weights=(0.3, 0.7))
    found = WeightMatchingSolver().solve(problem)
    best = min(
        barycenter_cost(problem, couplings, fused_measure(problem, couplings).support)
        for order in itertools.permutations(range(size))
        for couplings in [(Permutation.identity(size), Permutation(torch.tensor(order)))]
    )
    assert found.cost == pytest.approx(best, abs=1e-9)
    assert found.couplings[0].is_identity


@LAW
@given(st.integers(2, 5), st.integers(2, 8), SEEDS, st.booleans())
def test_the_objective_never_rises_and_never_exceeds_that_in_force(count, size, seed, has_initial):
    problem = random_problem((size,) * count, dimension=3, seed=seed)
    bound = math.inf
    if has_initial:
        generator = torch.Generator().manual_seed(seed)
        initial = [Permutation(torch.randperm(size, generator=generator)) for _ in range(count)]
        problem = replace(problem, initial=tuple(initial))
        bound = barycenter_cost(problem, initial, fused_measure(problem, initial).support)
    found = WeightMatchingSolver().solve(problem)
    trace = found.stats["objective"]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(trace))
    assert found.cost == pytest.approx(trace[-1])
    assert found.cost <= bound + 1e-9


@LAW
@given(st.integers(2, 5), SEEDS)
def test_no_single_source_can_be_aligned_better(count, seed):
    problem = random_problem((6,) * count, dimension=3, seed=seed)
    found = WeightMatchingSolver().solve(problem)
    for place in range(1, count):
        others = [
            problem.model_weights[other] * problem.measures[other].support[found.couplings[other].index]
            for other in range(count)
            if other != place
        ]
        cost = ground_cost(sum(others) / (1 - problem.model_weights[place]), problem.measures[place].support)
        rows = torch.arange(6)
        reached = cost[rows, found.couplings[place].index].sum()
        best = min(cost[rows, torch.tensor(order)].sum() for order in itertools.permutations(range(6)))
        assert reached <= best + 1e-9


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_permuted_copies_are_recovered(solver, dtype):
    problem = random_problem((9,) * 4, seed=2, dtype=dtype)
    first = problem.measures[0]
    orders = [torch.randperm(9, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    found = solver.solve(replace(problem, measures=(first, *(permuted(first, order) for order in orders))))
    assert found.cost < 1e-6
    assert found.couplings[0].is_identity
    for coupling, order in zip(found.couplings[1:], orders, strict=True):
        assert torch.equal(coupling.index, torch.argsort(order))
    torch.testing.assert_close(found.measure.support, first.support)


@pytest.mark.parametrize("has_initial", [False, True])
def test_two_sources_of_equal_width_take_one_product_and_one_assignment(monkeypatch, has_initial):
    calls = []
    for name in ("ground_cost", "couple"):
        real = getattr(solver_module, name)
        monkeypatch.setattr(
            solver_module,
            name,
            lambda *args, real=real, name=name, **kept: (calls.append(name), real(*args, **kept))[1],
        )
    problem = random_problem((6, 6))
    if has_initial:
        problem = replace(problem, initial=(Permutation.identity(6), Permutation.identity(6)))
    WeightMatchingSolver().solve(problem)
    assert sorted(calls) == ["couple", "ground_cost"]


@pytest.mark.parametrize("weightless", [0, 1, 2])
def test_sources_of_zero_weight_are_aligned_with_the_others(weightless):
    problem = random_problem((7,) * 3, seed=4)
    first = problem.measures[0]
    orders = [torch.randperm(7, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    weights = tuple(0.0 if place == weightless else 0.5 for place in range(3))
    measures = (first, *(permuted(first, order) for order in orders))
    found = WeightMatchingSolver().solve(replace(problem, measures=measures, model_weights=weights))
    assert found.couplings[0].is_identity
    assert torch.equal(found.couplings[1].index, torch.argsort(orders[0]))
    assert torch.equal(found.couplings[2].index, torch.argsort(orders[1]))


@LAW
@given(SEEDS)
def test_a_source_of_zero_weight_takes_its_best_order(seed):
    problem = random_problem((6,) * 3, dimension=3, seed=seed, model_weights=(0.5, 0.0, 0.5))
    found = WeightMatchingSolver().solve(problem)
    cost = ground_cost(found.measure.support, problem.measures[1].support)
    best = float(cost[torch.arange(6), couple(cost).index].sum())
    assert float(cost[torch.arange(6), found.couplings[1].index].sum()) == pytest.approx(best)


def test_couplings_in_force_are_kept_where_nothing_gains():
    problem = random_problem((6, 6))
    initial = WeightMatchingSolver().solve(problem).couplings
    again = WeightMatchingSolver().solve(replace(problem, initial=initial))
    assert again.couplings is initial


def test_different_sizes_are_coupled_to_the_source_of_the_fused_size():
    single = random_problem((5, 5), seed=3).measures[0]
    double = NeuronMeasure.uniform(single.support.repeat_interleave(2, 0))
    found = WeightMatchingSolver().solve(BarycenterProblem((double, single), (0.5, 0.5), 5))
    assert found.cost == pytest.approx(0, abs=1e-12)
    assert found.couplings[1].is_identity
    torch.testing.assert_close(found.measure.support, single.support)
    with pytest.raises(SolverError, match="or the solver 'wb'"):
        WeightMatchingSolver().solve(BarycenterProblem((double, single), (0.5, 0.5), 6))


def test_different_sizes_never_raise_the_objective():
    for seed in range(5):
        problem = random_problem((6, 9, 4), size=6, seed=seed)
        trace = WeightMatchingSolver().solve(problem).stats["objective"]
        assert all(after <= before + 1e-9 for before, after in itertools.pairwise(trace))


def test_the_average_is_the_weighted_mean_neuron_by_neuron():
    problem = random_problem((4, 4), slices=1, model_weights=(0.25, 0.75))
    found = AverageSolver().solve(problem)
    first, second = problem.measures
    torch.testing.assert_close(found.measure.support, 0.25 * first.support + 0.75 * second.support)
    torch.testing.assert_close(found.measure.structure, 0.25 * first.structure + 0.75 * second.structure)
    expected = 0.25 * 0.75 * float((first.support - second.support).square().sum()) / 4
    assert found.cost == pytest.approx(expected)


@pytest.mark.parametrize(("sizes", "size"), [((4, 5), 4), ((4, 4), 5)])
def test_the_average_of_different_sizes_is_refused(sizes, size):
    with pytest.raises(SolverError, match="equal size"):
        AverageSolver().solve(random_problem(sizes, size=size))


@pytest.mark.parametrize("solver", [*SOLVERS, AverageSolver()])
def test_weights_that_are_not_finite_are_reported(solver):
    problem = random_problem((4, 4))
    problem.measures[0].support[0, 0] = math.inf
    assert solver.solve(problem).status is Status.NONFINITE


def test_options_out_of_range_are_refused():
    with pytest.raises(MergeotError, match="max_steps"):
        WeightMatchingSolver(max_steps=0)
