"""Several sources on the costs of their pairs, and many small assignments at once."""

import itertools
from dataclasses import replace

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from mergekit_ot import (
    BarycenterProblem,
    NeuronMeasure,
    PairCosts,
    barycenter_cost,
    couple,
    fused_measure,
    ground_cost,
)
from mergekit_ot.testing import permuted
from mergekit_ot.testing.problems import random_problem
from mergekit_ot.transport import ascent
from mergekit_ot.transport.assignment import Prices
from mergekit_ot.transport.ground_cost import assignment_costs


@pytest.mark.parametrize("seed", range(3))
def test_the_objective_of_pairs_is_that_of_the_barycenter(seed):
    problem = random_problem((7,) * 4, seed=seed, model_weights=(0.1, 0.2, 0.3, 0.4))
    costs = PairCosts(problem)
    for start in (costs.in_turn(), costs.anchored_at(2)):
        found, trace = costs.ascend(start, 100)
        for couplings, objective in ((start, trace[0]), (found, trace[-1])):
            support = fused_measure(problem, couplings).support
            assert objective == pytest.approx(barycenter_cost(problem, couplings, support), rel=1e-5)
        assert trace == sorted(trace, reverse=True)


def test_no_other_partner_of_one_source_is_better_after_the_ascent():
    problem = random_problem((4,) * 3, seed=5)
    costs = PairCosts(problem)
    found, trace = costs.ascend(costs.in_turn(), 100)
    for place in (1, 2):
        for order in itertools.permutations(range(4)):
            other = list(found)
            other[place] = type(found[place])(torch.tensor(order))
            assert costs.objective(other) >= trace[-1] - 1e-6


def test_anchored_couplings_are_the_best_with_the_anchor():
    problem = random_problem((6,) * 3, seed=1)
    costs = PairCosts(problem)
    found = costs.anchored_at(1)
    assert found[1].is_identity
    for place in (0, 2):
        assert torch.equal(found[place].partners(), couple(costs.between(1, place)).partners())


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
def test_small_assignments_cost_what_single_ones_do(size):
    costs = torch.rand(7, size, size, generator=torch.Generator().manual_seed(size))
    wanted = [cost[torch.arange(size), couple(cost).partners()].sum() for cost in costs]
    torch.testing.assert_close(assignment_costs(costs), torch.stack(wanted))


def test_no_support_of_a_source_is_joined_while_pairs_are_searched():
    problem = BarycenterProblem((NeuronMeasure.uniform(torch.ones(2, 1)),) * 3, (0.5, 0.25, 0.25), size=2)
    assert PairCosts(problem).objective(PairCosts(problem).in_turn()) == 0


def ascended_anew(problem, couplings):
    """The ascent as it is said: every cost added up anew, every assignment solved from nothing."""
    supports, weights = [measure.support for measure in problem.measures], problem.model_weights
    index, rows = [coupling.partners() for coupling in couplings], torch.arange(problem.size)

    def objective():
        pairs = itertools.combinations(range(len(weights)), 2)
        return sum(
            weights[i] * weights[j] * float(ground_cost(supports[i], supports[j])[index[i], index[j]].double().mean())
            for i, j in pairs
        )

    trace, is_moved = [objective()], True
    while is_moved:
        is_moved = False
        for place in range(len(weights)):
            others = [other for other in range(len(weights)) if other != place]
            share = sum(weights[other] for other in others)
            cost = sum(
                ground_cost(supports[other], supports[place])[index[other]] * (weights[other] / share)
                for other in others
            )
            best = torch.from_numpy(linear_sum_assignment(cost.numpy())[1])
            if cost[rows, best].double().sum() < cost[rows, index[place]].double().sum() * (1 - 1e-6):
                index[place], is_moved = best, True
        if is_moved:
            trace.append(objective())
    return index, trace


@pytest.mark.parametrize("size", [5, 40, 300])
@pytest.mark.parametrize("both_ways", [1, 1024])
def test_costs_and_prices_that_are_kept_change_no_ascent(size, both_ways, monkeypatch):
    monkeypatch.setattr(ascent, "_BOTH_WAYS", both_ways)
    problem = random_problem((size,) * 4, dimension=12, seed=size, model_weights=(0.1, 0.2, 0.3, 0.4))
    costs = PairCosts(problem)
    for start in (costs.anchored_at(2), costs.in_turn(), costs.anchored_at(0)):
        index, trace = ascended_anew(problem, start)
        found, ours = costs.ascend(start, 100)
        assert ours == pytest.approx(trace, rel=1e-6)
        assert all(torch.equal(each.partners(), own) for each, own in zip(found, index, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("largest", [1.0, 1e4])
def test_prices_of_another_cost_change_no_assignment(dtype, largest):
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(300, 300, generator=generator, dtype=dtype)
    cost[7] *= largest
    prices = Prices(float(cost.max()))
    for step in range(4):
        rows = torch.randperm(300, generator=generator)[: 100 * step]
        cost[rows] = torch.rand(len(rows), 300, generator=generator, dtype=dtype)
        found = couple(cost, prices=prices).partners()
        best = linear_sum_assignment(cost.double().numpy())[1]
        paid = [float(cost[torch.arange(300), torch.as_tensor(each)].double().sum()) for each in (found, best)]
        assert paid[0] == pytest.approx(paid[1], rel=1e-6)
    assert prices.columns is not None


def test_ascents_that_meet_go_on_as_one(monkeypatch):
    problem = random_problem((6,) * 4, seed=3)
    orders = [torch.randperm(6, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    copies = tuple(permuted(problem.measures[0], order) for order in orders)
    costs, realigned = PairCosts(replace(problem, measures=copies)), []
    real = ascent.couple
    monkeypatch.setattr(
        ascent, "couple", lambda *args, **kept: (realigned.append("prices" in kept), real(*args, **kept))[1]
    )
    found, trace = costs.ascend_from_each(range(4), [costs.anchored_at(1)], 100)
    # The first start looks at every source but its own once; all others begin where it does.
    assert sum(realigned) == 3
    assert trace == [pytest.approx(0, abs=1e-12)]
    assert costs.objective(found) == trace[0]


def test_the_best_of_several_ascents_is_told():
    for seed in range(5):
        problem = random_problem((12,) * 5, dimension=2, seed=seed)
        costs = PairCosts(problem)
        ends = [PairCosts(problem).ascend(costs.anchored_at(anchor), 100)[1][-1] for anchor in range(5)]
        assert costs.ascend_from_each(range(5), [], 100)[1][-1] == pytest.approx(min(ends), rel=1e-6)
