"""Neurons of different mass are no assignment, whatever their number."""

from __future__ import annotations

import pytest
import torch

from mergekit_ot import BarycenterProblem, NeuronMeasure, default_manager


@pytest.mark.parametrize("solver", ["wb", "gwb"])
def test_masses_that_differ_are_kept_by_every_neuron(solver: str) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(3, 4, generator=generator) for _ in range(2))
    mass = torch.tensor([0.2, 0.3, 0.5])
    problem = BarycenterProblem((NeuronMeasure.uniform(first), NeuronMeasure(second, mass)), (0.5, 0.5), size=3)
    assert not problem.is_assignment
    assert BarycenterProblem(problem.measures[:1] * 2, (0.5, 0.5), size=3).is_assignment
    found = default_manager().get("solver", solver)().solve(problem).couplings[1]
    torch.testing.assert_close(found.source_marginal(), mass)
    torch.testing.assert_close(found.target_marginal(), torch.full((3,), 1 / 3))
