"""Gromov-Wasserstein finds orders that input weights alone cannot tell, over many draws; where it ends."""

from __future__ import annotations

import pytest
import torch
from mergeot_gromov.solver import GromovBarycenterSolver
from mergeot_wasserstein.solver import WassersteinBarycenterSolver
from planted import planted_permutation, share_recovered

SEEDS = range(5)
NOISE = 2.0


@pytest.mark.parametrize("options", [{}, {"gradient": "half"}, {"alpha": 1.0}], ids=str)
def test_structure_recovers_every_neuron_where_input_weights_recover_some(options):
    alone, shares = [], []
    for seed in SEEDS:
        problem, planted = planted_permutation(64, NOISE, seed=seed)
        alone.append(share_recovered(WassersteinBarycenterSolver().solve(problem), planted))
        shares.append(share_recovered(GromovBarycenterSolver(**options).solve(problem), planted))
    assert sum(alone) / len(alone) < 0.75
    assert max(alone) < 1
    assert shares == [1.0] * len(SEEDS)


@pytest.mark.parametrize(("size", "noise"), [(64, 1.0), (128, 1.25)])
def test_structure_alone_recovers_every_neuron(size, noise):
    for seed in SEEDS:
        problem, planted = planted_permutation(size, noise, dimension=0, seed=seed)
        assert share_recovered(GromovBarycenterSolver().solve(problem), planted) == 1.0


def test_the_input_weights_are_what_wb_sees():
    """The control: whatever the structure says, `wb` couples by the input weights."""
    problem, planted = planted_permutation(64, NOISE, seed=1)
    blind, _ = planted_permutation(64, NOISE, seed=1, has_structure=False)
    found, other = (WassersteinBarycenterSolver().solve(each).couplings[1].index for each in (problem, blind))
    assert torch.equal(found, other)
    assert not torch.equal(found, planted.index)


def test_the_shorter_gradient_ends_earlier():
    """At a noise of 3 and 64 neurons the whole gradient still finds most orders and its first half does not."""
    whole, half = [], []
    for seed in SEEDS:
        problem, planted = planted_permutation(64, 3.0, seed=seed)
        whole.append(share_recovered(GromovBarycenterSolver().solve(problem), planted))
        half.append(share_recovered(GromovBarycenterSolver(gradient="half").solve(problem), planted))
    assert sum(whole) / len(whole) > sum(half) / len(half) + 0.05
