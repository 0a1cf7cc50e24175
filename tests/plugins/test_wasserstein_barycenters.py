"""The free-support barycenter of many sources, against POT and brute force; entropic plans at the smallest epsilon."""

from __future__ import annotations

import itertools
import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergeot_wasserstein.entropic import sinkhorn
from mergeot_wasserstein.solver import WassersteinBarycenterSolver
from torch import Tensor

from mergekit_ot import Barycenter, BarycenterProblem, ground_cost, uniform_mass
from mergekit_ot.testing import random_problem
from mergekit_ot.transport.problem import Status

LAW = settings(deadline=None, max_examples=12)
SEEDS = st.integers(0, 10_000)
COUNTS = st.sampled_from([2, 4, 6, 16])
DTYPES = st.sampled_from([torch.float32, torch.float64])
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9}
# The paper's grid of epsilon, relative to the largest entry of the cost.
PAPER_EPSILONS = (0.01, 0.005, 0.001, 0.0005)
SHAPES = {"matched": (40, 40), "unmatched": (40, 40), "wider": (30, 48), "narrower": (48, 30)}


@st.composite
def problems(draw: st.DrawFn, is_equal: bool) -> BarycenterProblem:
    """Problems of 2 to 16 sources with weights of any size; of one width, or of a width each."""
    count, width = draw(COUNTS), draw(st.integers(2, 12))
    sizes = [width] * count if is_equal else [draw(st.integers(1, 14)) for _ in range(count)]
    seed = draw(SEEDS)
    weights = np.random.default_rng(seed).dirichlet(np.ones(count))
    return random_problem(
        sizes,
        size=width,
        dimension=draw(st.integers(1, 6)),
        model_weights=(weights / weights.sum()).tolist(),
        dtype=draw(DTYPES),
        seed=seed,
    )


def spreading(**options: float) -> WassersteinBarycenterSolver:
    """The solver that spreads the masses of all sources over the whole group, whatever the sizes are."""
    return WassersteinBarycenterSolver(keep_apart=False, **options)


def supports(problem: BarycenterProblem) -> list[np.ndarray]:
    return [measure.support.double().numpy() for measure in problem.measures]


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """The squared Wasserstein distance by POT."""
    return float(ot.emd2(ot.unif(len(one)), ot.unif(len(other)), ot.dist(one, other)))


def objective(problem: BarycenterProblem, support: np.ndarray) -> float:
    """What a support costs with the best couplings, by POT."""
    pairs = zip(problem.model_weights, supports(problem), strict=True)
    return sum(weight * distance(support, source) for weight, source in pairs)


def least_possible(problem: BarycenterProblem) -> float:
    """No barycenter costs less than the distances of all pairs of sources: couplings with it couple them too."""
    both = zip(problem.model_weights, supports(problem), strict=True)
    return sum(u * v * distance(x, y) for (u, x), (v, y) in itertools.combinations(both, 2))


def slack(problem: BarycenterProblem) -> float:
    return ROUNDING[problem.measures[0].support.dtype] * (1 + max(float(np.square(s).max()) for s in supports(problem)))


def moved_mean(problem: BarycenterProblem, found: Barycenter) -> Tensor:
    """The mean of what the couplings bring to each fused neuron."""
    brought = torch.zeros_like(found.measure.support, dtype=torch.float64)
    for weight, measure, coupling in zip(problem.model_weights, problem.measures, found.couplings, strict=True):
        plan = coupling.transport_plan(measure.mass).double()
        brought += weight * problem.size * torch.einsum("jk,kd->jd", plan, measure.support.double())
    return brought


@pytest.mark.parametrize("is_equal", [True, False])
@LAW
@given(data=st.data())
def test_the_objective_of_many_sources_falls_to_a_fixed_point(is_equal, data):
    problem = data.draw(problems(is_equal))
    found, room = spreading().solve(problem), slack(problem)
    trace = found.stats["objective"]
    assert all(after <= before + room for before, after in itertools.pairwise(trace))
    assert found.cost == pytest.approx(trace[-1], abs=room)
    # The support is the best one for the couplings, and the couplings are the best ones for the support.
    torch.testing.assert_close(found.measure.support.double(), moved_mean(problem, found), atol=room, rtol=0)
    if found.status is Status.CONVERGED:
        assert found.cost == pytest.approx(objective(problem, found.measure.support.double().numpy()), abs=room)


@pytest.mark.parametrize("is_equal", [True, False])
@LAW
@given(data=st.data())
def test_the_cost_lies_between_that_of_all_pairs_and_that_of_the_best_source(is_equal, data):
    problem = data.draw(problems(is_equal))
    found, room = spreading().solve(problem), slack(problem)
    assert found.cost >= least_possible(problem) - room
    fitting = [source for source in supports(problem) if len(source) == problem.size]
    for source in fitting:
        assert found.cost <= objective(problem, source) + room


@pytest.mark.parametrize("is_equal", [True, False])
@LAW
@given(data=st.data())
def test_no_further_start_makes_it_worse(is_equal, data):
    problem = data.draw(problems(is_equal))
    costs = [spreading(starts=starts).solve(problem).cost for starts in (1, 2, 3, 0)]
    assert all(more <= fewer + slack(problem) for fewer, more in itertools.pairwise(costs))


def test_further_starts_find_more_than_one_start_does():
    gains = 0
    for seed in range(10):
        problem = random_problem((24,) * 6, dimension=2, seed=seed)
        one, every = (spreading(starts=starts).solve(problem) for starts in (1, 0))
        assert (one.stats["starts"], every.stats["starts"]) == (1, 6)
        gains += every.cost < one.cost - 1e-6
    assert gains >= 7


@pytest.mark.parametrize(("size", "least_hits"), [(2, 19), (3, 14), (4, 10), (5, 6)])
def test_three_sources_beside_all_permutations(size, least_hits):
    hits = 0
    for seed in range(20):
        weights = np.random.default_rng(seed).dirichlet(np.ones(3))
        problem = random_problem((size,) * 3, dimension=2, seed=seed, model_weights=weights.tolist())
        found, best = spreading().solve(problem).cost, best_of_all_permutations(problem)
        assert best - 1e-9 <= found <= 1.3 * best
        hits += found <= best + 1e-9
    # Alternating is a local search: nothing promises the optimum, from three starts it is often found.
    assert hits >= least_hits


def best_of_all_permutations(problem: BarycenterProblem) -> float:
    """The least objective where every coupling is a permutation, the first source keeping its order."""
    orders = np.array(list(itertools.permutations(range(problem.size))))
    first, second, third = supports(problem)
    weights = problem.model_weights
    best = math.inf
    for order in orders:
        moved = np.broadcast_to(second[order], (len(orders), *second.shape))
        parts = np.stack([np.broadcast_to(first, moved.shape), moved, third[orders]])
        mean = np.tensordot(weights, parts, 1)
        costs = np.tensordot(weights, np.square(parts - mean).sum(3).mean(2), 1)
        best = min(best, float(costs.min()))
    return best


def hard_cost(kind: str, dtype: torch.dtype, seed: int = 0, scale: float = 1.0, dimension: int = 28) -> Tensor:
    """The ground cost of neurons with a noisy copy of themselves, or of unrelated neurons."""
    size, other = (max(1, round(scale * each)) for each in SHAPES[kind])
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(size, dimension, generator=generator, dtype=torch.float64)
    noise = torch.randn(other, dimension, generator=generator, dtype=torch.float64)
    source = target[torch.randperm(size, generator=generator)] + 0.1 * noise if kind == "matched" else noise
    return ground_cost(target.to(dtype), source.to(dtype))


def entropic_plan(cost: Tensor, paper_epsilon: float) -> Tensor:
    """Our plan for an epsilon relative to the largest entry; ours is relative to the mean."""
    masses = (uniform_mass(size, cost) for size in cost.shape)
    return sinkhorn(cost, *masses, paper_epsilon * float(cost.max() / cost.mean())).double()


def marginal_error(plan: Tensor) -> float:
    """The largest error of a marginal, relative to the mass of its neuron."""
    return max(float((plan.sum(axis) * plan.shape[1 - axis] - 1).abs().max()) for axis in (0, 1))


@pytest.mark.parametrize("epsilon", PAPER_EPSILONS)
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_marginals_are_right_down_to_the_smallest_epsilon_of_the_paper(kind, epsilon, dtype):
    plan = entropic_plan(hard_cost(kind, dtype), epsilon)
    assert float(plan.min()) >= 0
    # Masses in single precision sum to one up to its rounding only.
    assert marginal_error(plan) < (2e-6 if dtype == torch.float32 else 1e-9)


def test_plain_logarithms_miss_the_marginals_there():
    """The control: the recurrence of arXiv:2210.06671's early code, with 1e-6 inside the logarithm and 100 rounds."""
    errors = {}
    for kind in ("matched", "unmatched"):
        cost = hard_cost(kind, torch.float32)
        scaled, epsilon = cost / cost.max(), PAPER_EPSILONS[-1]
        mass = uniform_mass(cost.shape[0], cost).log()
        rows, columns = torch.zeros_like(mass), torch.zeros_like(mass)
        for _ in range(100):
            rows = epsilon * mass - epsilon * (((columns - scaled) / epsilon).exp().sum(1) + 1e-6).log()
            columns = epsilon * mass - epsilon * (((rows[:, None] - scaled) / epsilon).exp().sum(0) + 1e-6).log()
        errors[kind] = marginal_error(((rows[:, None] + columns - scaled) / epsilon).exp().double())
    assert errors["unmatched"] > 0.5


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_entropic_barycenter_at_the_smallest_epsilon_keeps_the_mean_of_the_sources(kind, dtype):
    """Wrong marginals rescale rows: with right ones the mean neuron is the mean of the sources' mean neurons."""
    size, other = SHAPES[kind]
    problem = random_problem((size, other, size), dimension=28, dtype=dtype)
    found = spreading(epsilon=2 * PAPER_EPSILONS[-1], starts=1, max_steps=2).solve(problem)
    for coupling in found.couplings:
        assert marginal_error(coupling.transport_plan().double()) < (1e-5 if dtype == torch.float32 else 1e-9)
    means = torch.stack([measure.support.mean(0) for measure in problem.measures])
    torch.testing.assert_close(found.measure.support.mean(0), means.mean(0), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("epsilon", PAPER_EPSILONS)
@pytest.mark.parametrize("kind", SHAPES)
def test_entropic_plans_cost_what_those_of_pot_cost(kind, epsilon):
    cost = hard_cost(kind, torch.float64, seed=1, scale=0.5)
    ours, theirs = entropic_plan(cost, epsilon).numpy(), pot_plan(cost.numpy(), epsilon)
    value = float((theirs * cost.numpy()).sum())
    assert float((ours * cost.numpy()).sum()) == pytest.approx(value, rel=1e-3)
    # Total variation of two plans; neither has converged to more digits than these.
    assert 0.5 * np.abs(ours - theirs).sum() < (1e-3 if epsilon >= 0.01 else 2e-2)


def pot_plan(cost: np.ndarray, epsilon: float) -> np.ndarray:
    """POT's plan, which needs the potentials of a larger epsilon to come near in a few hundred rounds."""
    masses = [ot.unif(size) for size in cost.shape]
    plan, potentials = np.outer(*masses), None
    for scale in (0.02, 0.005, 0.001, 0.0005):
        regularisation = max(scale, epsilon) * cost.max()
        start = None if potentials is None else tuple(each / regularisation for each in potentials)
        plan, log = ot.sinkhorn(
            *masses, cost, regularisation, "sinkhorn_log", 500, 1e-9, warn=False, log=True, warmstart=start
        )
        potentials = [log[name] * regularisation for name in ("log_u", "log_v")]
    return plan


def gaps_over(cost: Tensor, epsilons: tuple[float, ...]) -> list[float]:
    """How far entropic plans are above the exact cost, as a part of what they may pay for their entropy."""
    size, other = cost.shape
    exact = float(ot.emd2(ot.unif(size), ot.unif(other), cost.double().numpy()))
    may_pay = float(cost.max()) * math.log(min(size, other))
    return [(float((entropic_plan(cost, each) * cost).sum()) - exact) / (each * may_pay) for each in epsilons]


@settings(deadline=None, max_examples=10)
@given(st.sampled_from(list(SHAPES)), SEEDS, st.integers(2, 28), DTYPES)
def test_entropic_costs_fall_to_the_exact_one(kind, seed, dimension, dtype):
    cost = hard_cost(kind, dtype, seed, scale=0.3, dimension=dimension)
    large, small = gaps_over(cost, (0.1, *PAPER_EPSILONS[:2])), gaps_over(cost, PAPER_EPSILONS[2:])
    assert min(large + small) >= -1e-3
    assert max(large) <= 1
    # Rounds run out at the smallest epsilons of rectangular costs: see the test below.
    assert max(small) <= (1 if cost.shape[0] == cost.shape[1] else 5)


def test_a_rectangular_plan_at_the_smallest_epsilon_pays_for_its_entropy_only():
    cost = hard_cost("wider", torch.float64, scale=0.3, dimension=5)
    assert max(gaps_over(cost, PAPER_EPSILONS[-1:])) <= 1
