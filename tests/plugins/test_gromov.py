"""The fused Gromov-Wasserstein barycenter: contract and laws, then brute force, autograd and POT, then examples."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergeot_gromov import mergeot_solvers
from mergeot_gromov.pairwise import FusedGromov
from mergeot_gromov.refinement import RefinementSolver
from mergeot_gromov.search import frank_wolfe, polish, starting_points
from mergeot_gromov.solver import GromovBarycenterSolver

from mergekit_ot import Permutation, Plan, Signs
from mergekit_ot.errors import MergeotError
from mergekit_ot.testing import check_solver, permuted, random_problem
from mergekit_ot.transport.barycenter import independent_coupling
from mergekit_ot.transport.ground_cost import couple, ground_cost
from mergekit_ot.transport.measure import NeuronMeasure
from mergekit_ot.transport.problem import BarycenterProblem, Status

LAW = settings(deadline=None, max_examples=15)
SEEDS = st.integers(0, 10_000)


def plain(**options):
    """Returns the solver whose objective is the plain squared distance of supports and structures."""
    return GromovBarycenterSolver(**{"alpha": 1.0, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ({"gradient": "half"}, {"epsilon": 0.0}, {"alpha": 0.1})
        ),
    ],
)
def test_contract(options):
    check_solver(plain(**options))


def test_the_plugin_names_its_solver():
    assert set(mergeot_solvers()) == {GromovBarycenterSolver.name, RefinementSolver.name} == {"gwb", "refinement"}


def planted(size, noise, dimension=28, seed=0, dtype=torch.float32):
    """Weights and recurrent weights, and a permuted copy with noise on both; the order to be found."""
    generator = torch.Generator().manual_seed(seed)
    support, structure = (torch.randn(size, columns, generator=generator, dtype=dtype) for columns in (dimension, size))
    order = torch.randperm(size, generator=generator)
    first = NeuronMeasure.uniform(support, structure[None])
    copy = permuted(first, order)
    noisy = NeuronMeasure.uniform(
        copy.support + noise * torch.randn(size, dimension, generator=generator, dtype=dtype),
        copy.structure + noise * torch.randn(1, size, size, generator=generator, dtype=dtype),
    )
    return BarycenterProblem((first, noisy), (0.5, 0.5), size), torch.argsort(order)


@pytest.mark.parametrize(("size", "support_alone"), [(64, 0.8), (256, 0.5)])
@pytest.mark.parametrize("options", [{}, {"gradient": "half"}])
def test_structure_recovers_what_the_support_alone_cannot(size, support_alone, options):
    problem, order = planted(size, noise=2.0)
    found = plain(**options).solve(problem)
    assert torch.equal(found.couplings[1].index, order)
    alone = couple(ground_cost(problem.measures[0].support, problem.measures[1].support)).index
    assert float((alone == order).float().mean()) < support_alone


@pytest.mark.parametrize("noise", [0.6, 1.0, 1.25])
def test_structure_alone_recovers_a_noisy_copy(noise):
    problem, order = planted(64, noise, dimension=0)
    assert torch.equal(plain().solve(problem).couplings[1].index, order)


def test_an_antisymmetric_structure_is_seen():
    problem, order = planted(24, 0.2, dimension=0)
    measures = tuple(
        NeuronMeasure.uniform(each.support, each.structure - each.structure.transpose(1, 2))
        for each in problem.measures
    )
    found = plain().solve(replace(problem, measures=measures))
    assert torch.equal(found.couplings[1].index, order)


@pytest.mark.parametrize(("size", "dimension", "least_hits"), [(3, 3, 10), (4, 3, 10), (5, 3, 9), (4, 0, 5), (5, 0, 3)])
def test_small_groups_reach_the_optimum_over_all_permutations(size, dimension, least_hits):
    hits = 0
    for seed in range(10):
        problem = random_problem((size, size), dimension=dimension, slices=1, seed=seed)
        best = min(permutation_cost(problem, torch.tensor(order)) for order in itertools.permutations(range(size)))
        found = plain().solve(problem)
        assert found.cost == pytest.approx(permutation_cost(problem, found.couplings[1].index))
        assert found.cost >= best - 1e-9
        hits += found.cost <= best + 1e-9
    # unrelated structure alone is a quadratic assignment problem, for which nothing promises the optimum
    assert hits >= least_hits


@LAW
@given(st.lists(st.integers(2, 6), min_size=2, max_size=3), st.integers(2, 6), SEEDS)
def test_the_objective_never_rises(sizes, size, seed):
    problem = random_problem(sizes, size=size, slices=2, seed=seed)
    found = plain(keep_apart=False).solve(problem)
    trace = found.stats["objective"]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(trace))
    assert found.cost == pytest.approx(trace[-1])
    expected = sum(
        weight * float(four_index(found.measure, measure, coupling.transport_plan(measure.mass), 1.0))
        for weight, measure, coupling in zip(problem.model_weights, problem.measures, found.couplings, strict=True)
    )
    assert found.cost == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("sizes", [(5, 5), (5, 7)])
@pytest.mark.parametrize("is_symmetric", [False, True])
def test_objective_and_gradient_are_those_of_the_four_index_form(sizes, is_symmetric):
    problem = random_problem(sizes, slices=2)
    if is_symmetric:
        measures = [replace(each, structure=each.structure + each.structure.mT) for each in problem.measures]
    else:
        measures = list(problem.measures)
    pair = FusedGromov(measures[0], measures[1], alpha=0.7, is_half=False)
    assert pair.is_symmetric == is_symmetric
    plan = torch.from_numpy(
        ot.sinkhorn(ot.unif(sizes[0]), ot.unif(sizes[1]), np.random.default_rng(0).random(sizes), 0.3)
    )
    plan.requires_grad_()
    value = four_index(measures[0], measures[1], plan, 0.7)
    (gradient,) = torch.autograd.grad(value, plan)
    point = pair.at(Plan(plan.detach()))
    assert pair.objective(point) == pytest.approx(float(value.detach()))
    # equal on the transport polytope: up to a function of the row plus one of the column
    difference = pair.gradient(point).even - gradient
    centred = difference - difference.mean(0) - difference.mean(1, keepdim=True) + difference.mean()
    assert centred.abs().max() < 1e-9


@pytest.mark.parametrize("has_signs", [False, True])
@pytest.mark.parametrize("sizes", [(5, 5), (5, 7)])
def test_half_of_the_gradient_is_its_first_term(sizes, has_signs):
    problem, alpha = random_problem(sizes, slices=2, seed=1), 0.7
    columns, odd = torch.zeros(5, dtype=torch.bool), torch.tensor([False, True])
    signs = Signs(columns, odd, ~odd) if has_signs else None
    target, source = (replace(each, signs=signs) for each in problem.measures)
    half, full = (FusedGromov(target, source, alpha, is_half) for is_half in (True, False))
    coupling = independent_coupling(target.mass, source.mass)
    plan = coupling.transport_plan()
    rows = sum(one @ plan @ other.T for one, other in zip(half.target_density, half.source_density, strict=True))
    columns = sum(one.T @ plan @ other for one, other in zip(half.target_density, half.source_density, strict=True))

    def slope(pair):
        found = pair.gradient(pair.at(coupling))
        return found.even if found.odd is None else found.even + found.odd

    linear = ground_cost(target.support, source.support)
    torch.testing.assert_close(slope(half), linear - 2 * alpha * rows)
    torch.testing.assert_close(slope(full), linear - 2 * alpha * (rows + columns))
    assert not torch.allclose(slope(half), slope(full))


def test_half_of_the_gradient_searches_otherwise_for_the_same_objective():
    problems = [random_problem((9, 9), dimension=1, slices=1, seed=seed) for seed in range(8)]
    found = [[plain(gradient=name, random_starts=0).solve(each) for name in ("full", "half")] for each in problems]
    for problem, ends in zip(problems, found, strict=True):
        for end in ends:
            order = end.couplings[1].index[torch.argsort(end.couplings[0].index)]
            assert end.cost == pytest.approx(permutation_cost(problem, order))
    assert any(not full.couplings[1].is_same(half.couplings[1]) for full, half in found)


def test_a_permutation_is_the_squared_frobenius_difference():
    problem = random_problem((6, 6), slices=2)
    first, second = problem.measures
    index = torch.tensor([3, 1, 0, 5, 4, 2])
    pair = FusedGromov(first, second, alpha=1.0, is_half=False)
    moved = permuted(second, index)
    expected = (
        float((first.support - moved.support).square().sum() + (first.structure - moved.structure).square().sum()) / 6
    )
    assert pair.objective(pair.at(Permutation(index))) == pytest.approx(expected)


@pytest.mark.parametrize("is_half", [False, True])
def test_frank_wolfe_and_polish_never_raise_the_objective(is_half):
    for seed in range(5):
        problem = random_problem((8, 8), slices=1, seed=seed)
        pair = FusedGromov(*problem.measures, alpha=1.0, is_half=is_half)
        for start in starting_points(pair):
            values = [pair.objective(frank_wolfe(pair, start, steps)) for steps in (0, 1, 2, 4, 50)]
            assert all(after <= before + 1e-9 for before, after in itertools.pairwise(values))
            end = frank_wolfe(pair, start, 50)
            polished = polish(pair, end, 50, needs_vertex=False)
            assert pair.objective(polished) <= pair.objective(end) + 1e-9
            assert polish(pair, end, 50, needs_vertex=True).coupling.is_permutation


@pytest.mark.parametrize("sizes", [(12, 12), (8, 12), (12, 8)])
@pytest.mark.parametrize("seed", range(3))
def test_the_coupling_is_no_worse_than_that_of_pot(sizes, seed):
    problem = random_problem(sizes, dimension=2, slices=1, seed=seed)
    first, second = problem.measures
    cost = ground_cost(first.support, second.support)
    densities = [each.structure[0] * each.size / math.sqrt(sizes[0]) for each in problem.measures]
    theirs = ot.gromov.fused_gromov_wasserstein(
        cost.numpy(),
        *(each.numpy() for each in densities),
        ot.unif(sizes[0]),
        ot.unif(sizes[1]),
        symmetric=False,
        alpha=0.5,
        max_iter=500,
        tol_rel=1e-12,
        tol_abs=1e-12,
    )
    value = float(four_index(first, second, torch.from_numpy(theirs), 1.0))
    ours = plain(max_steps=500)._search(first, second)
    reached = float(four_index(first, second, ours.transport_plan(first.mass), 1.0))
    # a permutation is asked for at equal sizes, where POT may stop inside the polytope
    assert reached <= value * (1.02 if sizes[0] == sizes[1] else 1.0) + 1e-6


def test_planted_duplicate_is_folded_back():
    single = random_problem((6, 6), slices=2, seed=1).measures[0]
    twice = torch.arange(6).repeat_interleave(2)[torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    # every neuron twice, each copy sending half of what the neuron sent
    double = NeuronMeasure.uniform(single.support[twice], single.structure[:, twice][:, :, twice] / 2)
    found = plain().solve(BarycenterProblem((single, double), (0.5, 0.5), 6))
    assert found.cost == pytest.approx(0, abs=1e-10)
    torch.testing.assert_close(found.measure.support, single.support)
    torch.testing.assert_close(found.measure.structure, single.structure)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_three_permuted_copies_are_recovered(dtype):
    first = random_problem((10, 10), slices=1, seed=5, dtype=dtype).measures[0]
    orders = [torch.randperm(10, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    measures = (first, *(permuted(first, order) for order in orders))
    found = plain().solve(BarycenterProblem(measures, (1 / 3,) * 3, 10))
    assert found.status is Status.CONVERGED
    assert found.cost < 1e-5
    torch.testing.assert_close(found.measure.structure, first.structure)


def test_without_structure_it_is_the_wasserstein_coupling():
    problem = random_problem((8, 8))
    found = plain().solve(problem)
    assert torch.equal(
        found.couplings[1].index, couple(ground_cost(problem.measures[0].support, problem.measures[1].support)).index
    )


def test_couplings_in_force_that_are_better_are_kept():
    problem, order = planted(16, 0.5, dimension=2)
    best = (Permutation.identity(16), Permutation(order))
    found = plain(epsilon=0.0, max_steps=1).solve(replace(problem, initial=best))
    assert found.cost <= permutation_cost(problem, order) + 1e-6


def test_a_size_that_no_source_has_is_reached_by_resampling():
    problem = random_problem((6, 9), size=7, slices=1)
    found = plain().solve(problem)
    assert found.measure.structure.shape == (1, 7, 7)
    assert found.measure.support.shape == (7, 5)


def test_independent_coupling_is_a_point_of_the_polytope():
    problem = random_problem((4, 6), slices=1)
    pair = FusedGromov(*problem.measures, alpha=1.0, is_half=False)
    point = pair.at(independent_coupling(*(each.mass for each in problem.measures)))
    assert pair.objective(point) == pytest.approx(float(four_index(*problem.measures, point.plan, 1.0)))


def test_weights_that_are_not_finite_are_reported():
    problem = random_problem((4, 4), slices=1)
    problem.measures[0].structure[0, 0, 0] = math.nan
    assert plain().solve(problem).status is Status.NONFINITE


@pytest.mark.parametrize("options", [{"gradient": "quarter"}, {"alpha": -1.0}, {"max_steps": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(MergeotError, match="of solver 'gwb'"):
        plain(**options)


def permutation_cost(problem, index):
    """The objective of two equal-sized sources, the first keeping its order, after eliminating the barycenter."""
    first, moved = problem.measures[0], permuted(problem.measures[1], index)
    share = problem.model_weights[0] * problem.model_weights[1] / problem.size
    support, structure = (
        (first.support - moved.support).square().sum(),
        (first.structure - moved.structure).square().sum(),
    )
    return share * float(support + structure)


def four_index(target, source, plan, alpha):
    """The fused objective as it is written down, with densities and the factor one over the target's size."""
    size, count = plan.shape
    linear = (plan * (target.support[:, None] - source.support).square().sum(2)).sum()
    difference = size * target.structure[:, :, None, :, None] - count * source.structure[:, None, :, None, :]
    return linear + alpha * torch.einsum("sjkpq,jk,pq->", difference.square(), plan, plan) / size
