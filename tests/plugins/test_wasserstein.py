"""The Wasserstein solvers: the contract and laws, then brute force and POT, then examples."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import mergeot_wasserstein.entropic as entropic
import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergeot_wasserstein import mergeot_solvers
from mergeot_wasserstein.entropic import round_to_marginals, sinkhorn
from mergeot_wasserstein.fixed_support import FixedSupportSolver
from mergeot_wasserstein.solver import WassersteinBarycenterSolver

from mergekit_ot import Permutation
from mergekit_ot.errors import RecipeError, SolverError
from mergekit_ot.testing import check_solver, permuted, random_problem
from mergekit_ot.transport.barycenter import barycenter_cost, fused_measure, transport_cost
from mergekit_ot.transport.ground_cost import ground_cost
from mergekit_ot.transport.measure import NeuronMeasure
from mergekit_ot.transport.problem import BarycenterProblem, Status

LAW = settings(deadline=None, max_examples=40)
SEEDS = st.integers(0, 10_000)
DTYPES = st.sampled_from([torch.float32, torch.float64])


def is_falling(trace):
    return all(after <= before + 1e-6 * abs(before) for before, after in itertools.pairwise(trace))


@pytest.mark.parametrize(
    "solver",
    [
        WassersteinBarycenterSolver(),
        WassersteinBarycenterSolver(starts=1),
        pytest.param(WassersteinBarycenterSolver(epsilon=0.01, starts=1), marks=pytest.mark.slow),
        pytest.param(WassersteinBarycenterSolver(epsilon=0.01), marks=pytest.mark.slow),
        FixedSupportSolver(),
        FixedSupportSolver(epsilon=0.01),
    ],
)
def test_contract(solver):
    check_solver(solver)


def test_the_plugin_names_solvers_that_exist():
    names = mergeot_solvers()
    assert set(names) == {"wb", "otfusion"}
    assert (WassersteinBarycenterSolver.name, FixedSupportSolver.name) == ("wb", "otfusion")


@LAW
@given(st.integers(1, 12), st.integers(1, 6), SEEDS, DTYPES)
def test_a_permuted_copy_is_recovered(size, dimension, seed, dtype):
    problem = random_problem((size, size), dimension=dimension, seed=seed, dtype=dtype)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    problem = replace(problem, measures=(problem.measures[0], permuted(problem.measures[0], order)))
    for solver in (WassersteinBarycenterSolver(), FixedSupportSolver()):
        found = solver.solve(problem)
        assert found.cost < 1e-5
        torch.testing.assert_close(found.measure.support, problem.measures[0].support)


@LAW
@given(st.integers(1, 5), SEEDS, st.floats(0.01, 0.99))
def test_two_sources_reach_the_optimum_over_all_permutations(size, seed, share):
    problem = random_problem((size, size), dimension=3, seed=seed, model_weights=(share, 1 - share))
    found = WassersteinBarycenterSolver().solve(problem)
    assert found.couplings[0].is_identity
    assert found.status is Status.CONVERGED
    assert found.cost == pytest.approx(brute_force(problem), abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_three_sources_are_never_below_and_rarely_above_brute_force(seed):
    problem = random_problem((4, 4, 4), dimension=2, seed=seed, model_weights=(0.2, 0.5, 0.3))
    found, best = WassersteinBarycenterSolver().solve(problem).cost, brute_force(problem)
    assert best - 1e-9 <= found <= 1.2 * best


@LAW
@given(st.lists(st.integers(1, 8), min_size=2, max_size=4), st.integers(1, 8), SEEDS, st.booleans())
def test_the_objective_never_rises(sizes, size, seed, has_initial):
    problem = random_problem(sizes, size=size, seed=seed)
    solver = WassersteinBarycenterSolver()
    if has_initial:
        problem = replace(
            problem, initial=FixedSupportSolver().solve(replace(problem, size=sizes[0])).couplings, size=sizes[0]
        )
    found = solver.solve(problem)
    assert is_falling(found.stats["objective"])
    assert found.cost == pytest.approx(found.stats["objective"][-1])
    assert found.cost == pytest.approx(barycenter_cost(problem, found.couplings, found.measure.support), abs=1e-9)
    if has_initial:
        support = fused_measure(problem, problem.initial).support
        assert found.cost <= barycenter_cost(problem, problem.initial, support) + 1e-9


@LAW
@given(st.integers(2, 7), st.integers(2, 7), SEEDS)
def test_fixed_support_costs_what_pot_says(size, other, seed):
    problem = random_problem((size, other), seed=seed, model_weights=(0.4, 0.6))
    cost = ground_cost(problem.measures[0].support, problem.measures[1].support)
    expected = 0.6 * ot.emd2(ot.unif(size), ot.unif(other), cost.numpy())
    assert FixedSupportSolver(ground="square").solve(problem).cost == pytest.approx(expected)


@LAW
@given(st.integers(2, 7), st.integers(2, 7), SEEDS, st.booleans())
def test_fixed_support_couples_by_the_euclidean_distance_as_pot_does(size, other, seed, normalised):
    problem = random_problem((size, other), seed=seed)
    supports = [measure.support.double() for measure in problem.measures]
    if normalised:
        supports = [support / support.norm(dim=1, keepdim=True) for support in supports]
    cost = torch.cdist(*supports)
    plan = FixedSupportSolver(normalised=normalised).solve(problem).couplings[1].transport_plan(cost)
    assert float((plan * cost).sum()) == pytest.approx(ot.emd2(ot.unif(size), ot.unif(other), cost.numpy()), rel=1e-4)


def test_fixed_support_refuses_an_unknown_ground_cost():
    with pytest.raises(RecipeError, match=r"'euclidean' or 'square'"):
        FixedSupportSolver(ground="manhattan")


@pytest.mark.parametrize("sizes", [(6, 6, 6), (6, 9, 5), (4, 6)])
def test_the_barycenter_is_no_worse_than_that_of_pot(sizes):
    problem = random_problem(sizes, size=6)
    solver = WassersteinBarycenterSolver()
    supports = [measure.support.numpy() for measure in problem.measures]
    weights = np.array(problem.model_weights)
    for start in supports:
        if start.shape[0] != problem.size:
            continue
        masses = [ot.unif(len(support)) for support in supports]
        theirs = ot.lp.free_support_barycenter(supports, masses, start, ot.unif(6), weights, 100, 1e-12)
        value = sum(
            weight * ot.emd2(ot.unif(6), mass, ot.dist(theirs, support))
            for weight, mass, support in zip(weights, masses, supports, strict=True)
        )
        assert solver.solve(problem).cost <= value + 1e-9


def test_two_diracs_meet_between():
    measures = tuple(NeuronMeasure.uniform(torch.tensor([[position]])) for position in (1.0, 4.0))
    found = WassersteinBarycenterSolver().solve(BarycenterProblem(measures, (0.25, 0.75), 1))
    assert found.measure.support.item() == pytest.approx(3.25)
    assert found.cost == pytest.approx(0.25 * 0.75 * 9)


def test_planted_duplicate_is_folded_back():
    single = random_problem((5, 5), seed=3).measures[0]
    double = NeuronMeasure.uniform(single.support.repeat_interleave(2, 0)[torch.randperm(10)])
    for order in ((single, double), (double, single)):
        found = WassersteinBarycenterSolver().solve(BarycenterProblem(order, (0.5, 0.5), 5))
        assert found.cost == pytest.approx(0, abs=1e-12)
        assert ground_cost(found.measure.support, single.support).min(1).values.max() < 1e-12


def test_equal_widths_fuse_to_the_mean_of_aligned_rows():
    problem = random_problem((8, 8))
    found = WassersteinBarycenterSolver().solve(problem)
    aligned = problem.measures[1].support[found.couplings[1].index]
    torch.testing.assert_close(found.measure.support, (problem.measures[0].support + aligned) / 2)


@pytest.mark.parametrize("has_initial", [False, True])
def test_two_sources_of_equal_width_take_one_product_and_one_assignment(monkeypatch, has_initial):
    calls = []
    for name in ("ground_cost", "couple"):
        real = getattr(entropic, name)
        monkeypatch.setattr(entropic, name, lambda *args, real=real, name=name: (calls.append(name), real(*args))[1])
    problem = random_problem((6, 6))
    if has_initial:
        problem = replace(problem, initial=(Permutation.identity(6), Permutation.identity(6)))
    WassersteinBarycenterSolver().solve(problem)
    assert calls == ["ground_cost", "couple"]


def test_sources_of_zero_weight_are_coupled_and_do_not_matter():
    problem = random_problem((6, 6, 6), model_weights=(0.5, 0.5, 0.0))
    pair = replace(problem, measures=problem.measures[:2], model_weights=(0.5, 0.5))
    found, alone = (WassersteinBarycenterSolver().solve(each) for each in (problem, pair))
    assert torch.equal(found.measure.support, alone.measure.support)
    assert found.cost == alone.cost
    best = ot.emd2([], [], ground_cost(found.measure.support, problem.measures[2].support).numpy())
    assert transport_cost(found.couplings[2], found.measure.support, problem.measures[2].support) == pytest.approx(best)


def test_one_hot_weights_start_at_that_source():
    problem = random_problem((6, 6, 6), model_weights=(0.0, 1.0, 0.0))
    found = WassersteinBarycenterSolver().solve(problem)
    assert found.couplings[1].is_identity
    assert found.cost == 0
    assert torch.equal(found.measure.support, problem.measures[1].support)


def test_the_fused_neurons_are_in_the_order_of_the_first_source_that_counts():
    for seed in range(5):
        problem = random_problem((6,) * 4, seed=seed, model_weights=(0.0, 0.2, 0.3, 0.5))
        assert WassersteinBarycenterSolver().solve(problem).couplings[1].is_identity


def test_more_starts_are_never_worse():
    for seed in range(5):
        problem = random_problem((7,) * 4, dimension=2, seed=seed)
        one, every = (WassersteinBarycenterSolver(starts=starts).solve(problem) for starts in (1, 0))
        assert every.cost <= one.cost
        assert (one.stats["starts"], every.stats["starts"]) == (1, 4)


def test_structure_is_transported_though_it_does_not_steer():
    problem = random_problem((5, 5), slices=2)
    found = WassersteinBarycenterSolver().solve(problem)
    moved = permuted(problem.measures[1], found.couplings[1].index).structure
    torch.testing.assert_close(found.measure.structure, (problem.measures[0].structure + moved) / 2)


def test_the_step_limit_is_reported():
    found = WassersteinBarycenterSolver(max_steps=1).solve(random_problem((7, 7, 7), dimension=2))
    assert found.status is Status.MAX_STEPS


@pytest.mark.parametrize("solver", [WassersteinBarycenterSolver(), FixedSupportSolver()])
def test_weights_that_are_not_finite_are_reported(solver):
    problem = random_problem((4, 4))
    problem.measures[1].support[0, 0] = math.nan
    assert solver.solve(problem).status is Status.NONFINITE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": -1.0}, r"Option epsilon of solver 'wb' is -1\.0: a number, at least 0\."),
        ({"max_steps": 0}, "Option max_steps of solver 'wb' is 0: a whole number, at least 1, at most 1000000"),
        ({"starts": -1}, "Option starts of solver 'wb' is -1: a whole number, at least 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        WassersteinBarycenterSolver(**options)


def test_fixed_support_needs_a_source_of_the_fused_size():
    with pytest.raises(SolverError, match="Choose another target, or the solver 'wb'"):
        FixedSupportSolver().solve(random_problem((4, 5), size=6))


@LAW
@given(st.integers(1, 9), st.integers(1, 9), SEEDS, st.sampled_from([0.5, 0.05, 0.002]), DTYPES)
def test_entropic_plans_have_exact_marginals(rows, columns, seed, epsilon, dtype):
    problem = random_problem((rows, columns), seed=seed, dtype=dtype)
    target, source = problem.measures
    plan = sinkhorn(ground_cost(target.support, source.support), target.mass, source.mass, epsilon)
    assert float(plan.min()) >= 0
    assert (plan.sum(1) - target.mass).abs().max() < 1e-6
    assert (plan.sum(0) - source.mass).abs().max() < 1e-6


@pytest.mark.parametrize("epsilon", [0.5, 0.05])
def test_entropic_plans_agree_with_pot(epsilon):
    problem = random_problem((8, 6))
    cost = ground_cost(problem.measures[0].support, problem.measures[1].support)
    plan = sinkhorn(cost, problem.measures[0].mass, problem.measures[1].mass, epsilon)
    regularisation = epsilon * float(cost.mean())
    theirs = ot.sinkhorn(ot.unif(8), ot.unif(6), cost.numpy(), regularisation, "sinkhorn_log", 100_000, 1e-12)
    np.testing.assert_allclose(plan.numpy(), theirs, atol=1e-6)


def test_small_epsilon_approaches_the_exact_cost_and_scale_does_not_matter():
    problem = random_problem((8, 6))
    cost = ground_cost(problem.measures[0].support, problem.measures[1].support)
    masses = (problem.measures[0].mass, problem.measures[1].mass)
    exact = ot.emd2(ot.unif(8), ot.unif(6), cost.numpy())
    gaps = [float((sinkhorn(cost, *masses, epsilon) * cost).sum()) - exact for epsilon in (0.5, 0.05, 0.001)]
    assert gaps[0] > gaps[1] > gaps[2] >= -1e-9
    assert gaps[2] < 1e-3 * exact
    torch.testing.assert_close(sinkhorn(1e6 * cost, *masses, 0.05), sinkhorn(cost, *masses, 0.05))


def test_rounding_leaves_a_right_plan_as_it_is():
    plan = torch.full((4, 6), 1 / 24, dtype=torch.float64)
    torch.testing.assert_close(round_to_marginals(plan, plan.sum(1), plan.sum(0)), plan)


def brute_force(problem):
    """The least objective over all permutations, the first source keeping its order."""
    size = problem.size
    orders = [torch.tensor(order) for order in itertools.permutations(range(size))]
    best = math.inf
    for chosen in itertools.product(orders, repeat=len(problem.measures) - 1):
        couplings = [Permutation.identity(size), *(Permutation(order) for order in chosen)]
        best = min(best, barycenter_cost(problem, couplings, fused_measure(problem, couplings).support))
    return best
