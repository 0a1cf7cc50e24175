"""Ground cost, exact couplings and the fused measure: laws, then SciPy and POT, then examples."""

from __future__ import annotations

import builtins
import math
from dataclasses import replace

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from mergekit_ot.errors import SolverError
from mergekit_ot.testing import permuted, random_problem
from mergekit_ot.transport import ground_cost as module
from mergekit_ot.transport.barycenter import (
    barycenter_cost,
    fused_measure,
    in_order_of,
    independent_coupling,
    transport_cost,
    unsolved,
)
from mergekit_ot.transport.ground_cost import couple, ground_cost
from mergekit_ot.transport.measure import NeuronMeasure
from mergekit_ot.transport.permutation import Permutation
from mergekit_ot.transport.plan import Plan
from mergekit_ot.transport.problem import Status

SEEDS = st.integers(0, 10_000)
LAW = settings(deadline=None, max_examples=50)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@LAW
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 6), SEEDS)
def test_ground_cost_is_the_squared_distance(rows, columns, dimension, seed):
    target, source = gaussian(rows, dimension, seed=seed), gaussian(columns, dimension, seed=seed + 1)
    expected = (target[:, None] - source[None]).square().sum(2)
    torch.testing.assert_close(ground_cost(target, source), expected)


def test_ground_cost_with_an_inherited_coupling_is_the_four_index_form():
    # weights read layers of different width; as densities, transported, they differ by the four-index cost's
    # variable part: the cost of couplings agrees up to what the marginals fix
    width, source_width, rows, columns = 4, 6, 3, 5
    target, source = gaussian(rows, width), gaussian(columns, source_width, seed=1)
    plan = torch.from_numpy(ot.emd(ot.unif(width), ot.unif(source_width), np.random.default_rng(0).random((4, 6))))
    densities = width * target, source_width * source
    four_index = torch.einsum("jqks,qs->jk", (densities[0][:, :, None, None] - densities[1]).square(), plan) / width
    moved = source @ Plan(plan).split_map(plan)
    difference = ground_cost(target, moved) - four_index
    # rank one: a function of the row alone plus a function of the column alone
    centred = difference - difference.mean(0) - difference.mean(1, keepdim=True) + difference.mean()
    assert centred.abs().max() < 1e-10


def test_half_precision_costs_are_computed_in_single():
    target = gaussian(4, 3, dtype=torch.bfloat16)
    assert ground_cost(target, target).dtype == torch.float32
    assert ground_cost(target, target).diagonal().abs().max() < 1e-5


@LAW
@given(st.integers(1, 40), SEEDS, st.sampled_from([torch.float32, torch.float64]))
def test_square_uniform_coupling_is_an_optimal_permutation(size, seed, dtype):
    cost = gaussian(size, size, seed=seed, dtype=dtype)
    index = couple(cost).index
    assert index is not None
    assert sorted(index.tolist()) == list(range(size))
    rows, columns = linear_sum_assignment(cost.double().numpy())
    best = float(cost.double()[rows, columns].sum())
    assert float(cost.double()[torch.arange(size), index].sum()) <= best + 1e-5 * size


def rows_apart(kind, size):
    """Two layers whose assignment is begun in the one way or the other."""
    generator = torch.Generator().manual_seed(size)
    dimension = 3 if kind == "few dimensions" else 2 * size
    target, source = (torch.randn(size, dimension, generator=generator) for _ in range(2))
    if kind == "planted":
        source = target[torch.randperm(size, generator=generator)] + 0.7 * source
    if kind == "norms apart":
        target, source = (rows * torch.linspace(0.1, 5, size)[:, None] for rows in (target, source))
    return target, source


@pytest.mark.parametrize("size", [130, 300])
@pytest.mark.parametrize("kind", ["many dimensions", "few dimensions", "planted", "norms apart"])
def test_assignments_of_wide_layers_are_optimal(kind, size):
    cost = ground_cost(*rows_apart(kind, size))
    best = cost.double()[linear_sum_assignment(cost.double().numpy())].sum()
    found = cost.double()[torch.arange(size), couple(cost).partners()].sum()
    assert float(found) == pytest.approx(float(best), rel=1e-6)


@pytest.mark.parametrize("kind", ["many dimensions", "few dimensions"])
def test_what_a_row_or_a_column_costs_more_changes_no_assignment(kind):
    cost = ground_cost(*rows_apart(kind, 300)).double()
    shift = torch.linspace(-500, 500, 300, dtype=torch.float64)
    expected = couple(cost).partners()
    assert torch.equal(couple(cost + shift[:, None]).partners(), expected)
    assert torch.equal(couple(cost - shift).partners(), expected)


def test_wide_costs_near_the_largest_number_are_assigned():
    size = 300
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    cost = torch.full((size, size), 2e38) - 1e38 * torch.rand(size, size, generator=torch.Generator().manual_seed(1))
    cost[torch.arange(size), order] = 0.0
    assert torch.equal(couple(cost).partners(), order)


@pytest.mark.parametrize("missing", ["lap", "nothing"])
def test_assignment_is_the_same_without_lapx(missing, monkeypatch):
    cost = gaussian(60, 60)
    expected = linear_sum_assignment(cost.numpy())[1]
    hide(monkeypatch, missing)
    assert couple(cost).index.tolist() == expected.tolist()


@LAW
@given(st.integers(1, 8), st.integers(1, 8), SEEDS)
def test_unequal_coupling_is_optimal_and_keeps_marginals(rows, columns, seed):
    cost = gaussian(rows, columns, seed=seed).square()
    generator = np.random.default_rng(seed)
    masses = [torch.from_numpy(generator.dirichlet(np.full(size, 3.0))) for size in (rows, columns)]
    coupling = couple(cost, *masses)
    plan = coupling.transport_plan(cost)
    torch.testing.assert_close(plan.sum(1), masses[0], atol=1e-9, rtol=0)
    torch.testing.assert_close(plan.sum(0), masses[1], atol=1e-9, rtol=0)
    assert float((plan * cost).sum()) == pytest.approx(
        ot.emd2(masses[0].numpy(), masses[1].numpy(), cost.numpy()), abs=1e-9
    )


def test_unequal_sizes_without_pot_say_what_to_install(monkeypatch):
    hide(monkeypatch, "ot")
    with pytest.raises(SolverError, match="pip install POT"):
        couple(gaussian(3, 4))


def test_ties_keep_the_identity_and_the_preferred_permutation():
    cost = torch.zeros(5, 5)
    assert couple(cost).is_identity
    preferred = Permutation(torch.tensor([1, 0, 2, 4, 3]))
    assert couple(cost, prefer=preferred) is preferred
    # a preference is no licence to be worse
    assert couple(1 - torch.eye(5), prefer=preferred).is_identity


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_costs_that_are_not_finite_are_refused(bad):
    cost = torch.zeros(3, 3)
    cost[1, 2] = bad
    with pytest.raises(SolverError, match="not finite"):
        couple(cost)


@LAW
@given(SEEDS, st.booleans())
def test_fused_measure_is_the_minimiser_for_its_couplings(seed, is_square):
    sizes = (4, 4) if is_square else (6, 5)
    problem = random_problem(sizes, size=4, seed=seed, model_weights=(0.3, 0.7))
    plans = [torch.from_numpy(ot.emd(ot.unif(4), ot.unif(n), gaussian(4, n, seed=seed).numpy())) for n in sizes]
    couplings = [Plan(plan) for plan in plans]
    support = fused_measure(problem, couplings).support.requires_grad_()
    total = sum(
        weight * (plan * (support[:, None] - measure.support).square().sum(2)).sum()
        for weight, plan, measure in zip(problem.model_weights, plans, problem.measures, strict=True)
    )
    (gradient,) = torch.autograd.grad(total, support)
    assert gradient.abs().max() < 1e-12
    assert float(total.detach()) == pytest.approx(barycenter_cost(problem, couplings, support.detach()))


def test_permutations_and_their_plans_fuse_to_the_same_measure():
    problem = random_problem((5, 5), slices=2)
    index = torch.tensor([2, 0, 1, 4, 3])
    by_index = [Permutation.identity(5), Permutation(index)]
    by_plan = [Plan(coupling.transport_plan(problem.measures[0].mass)) for coupling in by_index]
    first, second = fused_measure(problem, by_index), fused_measure(problem, by_plan)
    torch.testing.assert_close(first.support, second.support)
    torch.testing.assert_close(first.structure, second.structure)
    expected = (problem.measures[0].structure + permuted(problem.measures[1], index).structure) / 2
    torch.testing.assert_close(first.structure, expected)


def test_sources_of_zero_weight_do_not_enter_even_when_infinite():
    problem = random_problem((4, 4), model_weights=(1.0, 0.0))
    broken = NeuronMeasure.uniform(torch.full((4, 5), math.inf, dtype=torch.float64))
    problem = replace(problem, measures=(problem.measures[0], broken))
    identity = [Permutation.identity(4)] * 2
    assert torch.equal(fused_measure(problem, identity).support, problem.measures[0].support)
    assert barycenter_cost(problem, identity, problem.measures[0].support) == 0


def test_structure_given_for_only_some_sources_is_refused():
    problem = random_problem((4, 4), slices=1)
    problem = replace(problem, measures=(problem.measures[0], NeuronMeasure.uniform(problem.measures[1].support)))
    with pytest.raises(SolverError, match="structures do not match"):
        fused_measure(problem, [Permutation.identity(4)] * 2)


@LAW
@given(SEEDS)
def test_transport_cost_does_not_depend_on_how_a_coupling_is_stored(seed):
    target, source = gaussian(6, 3, seed=seed), gaussian(6, 3, seed=seed + 1)
    coupling = Permutation(torch.randperm(6, generator=torch.Generator().manual_seed(seed)))
    dense = Plan(coupling.transport_plan(target))
    assert transport_cost(coupling, target, source) == pytest.approx(transport_cost(dense, target, source))


def test_in_order_of_gives_the_identity_and_keeps_the_pairs():
    couplings = [Permutation(torch.tensor([2, 0, 1])), Permutation(torch.tensor([1, 2, 0]))]
    first, second = in_order_of(couplings, 0)
    assert first.is_identity
    pairs = set(zip(couplings[0].index.tolist(), couplings[1].index.tolist(), strict=True))
    assert pairs == set(zip(first.index.tolist(), second.index.tolist(), strict=True))
    soft = independent_coupling(torch.full((3,), 1 / 3), torch.full((4,), 1 / 4))
    assert in_order_of([soft, couplings[0]], 0)[1] is couplings[0]


def test_unsolved_hands_back_nothing_for_finite_sources_and_the_status_otherwise():
    problem = random_problem((4, 4))
    assert unsolved(problem) is None
    problem.measures[1].support[0, 0] = math.nan
    found = unsolved(problem)
    assert found.status is Status.NONFINITE
    assert math.isnan(found.cost)
    assert all(coupling.is_identity for coupling in found.couplings)
    soft = unsolved(replace(problem, size=6)).couplings[0]
    assert (soft.target_size, soft.source_size) == (6, 4)


def hide(monkeypatch, missing):
    found = module._optional
    monkeypatch.setattr(module, "_optional", lambda name: None if name == missing else found(name))
    real = builtins.__import__

    def importing(name, *args, **options):
        if name == missing:
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", importing)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 1e-300, 4e307])
def test_one_and_two_neurons_are_coupled_as_scipy_couples_them(size, scale):
    generator = np.random.default_rng(size)
    for _ in range(20):
        cost = scale * generator.uniform(size=(size, size))
        found = couple(torch.from_numpy(cost)).partners().tolist()
        assert found == linear_sum_assignment(cost)[1].tolist()
