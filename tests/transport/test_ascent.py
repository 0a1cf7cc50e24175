"""Several sources on the costs of their pairs, and many small assignments at once."""

import itertools

import pytest
import torch

from mergekit_ot import BarycenterProblem, NeuronMeasure, PairCosts, barycenter_cost, couple, fused_measure
from mergekit_ot.testing.problems import random_problem
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
