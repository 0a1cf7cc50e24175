"""What each source has to do with the others: one of no weight is coupled all the same, and none holds itself back."""

from __future__ import annotations

import pytest
import torch
from mergeot_gromov.starts import starting_measures

from mergekit_ot import BarycenterProblem, NeuronMeasure, Permutation, couple, default_manager, ground_cost


@pytest.mark.parametrize(("solver", "is_in_force"), [("gwb", False), ("refinement", True)])
def test_a_copy_of_no_weight_is_coupled_neuron_by_neuron(solver: str, is_in_force: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    order = torch.tensor([3, 0, 4, 1, 2])
    supports = [torch.randn(5, 3, generator=generator) for _ in range(2)]
    structures = [torch.randn(1, 5, 5, generator=generator) for _ in range(2)]
    measures = [NeuronMeasure.uniform(*each) for each in zip(supports, structures, strict=True)]
    # A copy of the first, in another order.
    measures.append(NeuronMeasure.uniform(supports[0][order], structures[0][:, order][:, :, order]))
    identity = Permutation.identity(5)
    worse = (identity, Permutation(torch.tensor([1, 2, 3, 4, 0])), identity)
    problem = BarycenterProblem(tuple(measures), (0.9, 0.1, 0.0), 5, initial=worse if is_in_force else None)
    found = default_manager().get("solver", solver)(random_starts=1).solve(problem).couplings
    assert found[0].is_identity
    assert found[2].partners().tolist() == torch.argsort(order).tolist()


def test_a_source_is_not_held_back_by_the_mean_that_it_is_part_of() -> None:
    generator = torch.Generator().manual_seed(1)
    # Neurons of many numbers are far from all others, and near the mean with whom they stand.
    first, second = (torch.randn(8, 64, generator=generator) for _ in range(2))
    measures = (NeuronMeasure.uniform(first), NeuronMeasure.uniform(second))
    problem = BarycenterProblem(measures, (0.5, 0.5), 8, initial=(Permutation.identity(8),) * 2)
    found = default_manager().get("solver", "refinement")().solve(problem)
    best = couple(ground_cost(first, second))
    assert not best.is_identity
    assert found.couplings[1].partners().tolist() == best.partners().tolist()


@pytest.mark.parametrize("size", [3, 6, 9])
def test_what_flows_into_a_neuron_of_a_start_is_what_flows_into_its_original(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    measure = NeuronMeasure.uniform(torch.arange(3.0)[:, None], torch.randn(2, 3, 3, generator=generator))
    others = NeuronMeasure.uniform(torch.randn(4, 1), torch.randn(2, 4, 4))
    problem = BarycenterProblem((measure, others), (1.0, 0.0), size)
    ((start, _),) = starting_measures(problem)
    assert start.size == size
    assert start.structure is not None
    assert measure.structure is not None
    originals = start.support[:, 0].long()
    torch.testing.assert_close(start.structure.sum(2), measure.structure.sum(2)[:, originals])
