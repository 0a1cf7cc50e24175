"""Costs of neurons from products of blocks: the same as from joined rows, kept between sweeps or taken anew."""

from dataclasses import replace
from itertools import pairwise

import torch
from torch import nn

from mergekit_ot import FusionInputs, FusionOptions, Permutation, ground_cost, measure_cost, trace_model
from mergekit_ot.fusion.alignment import Alignment
from mergekit_ot.fusion.engine import FusionRun
from mergekit_ot.fusion.group_view import GroupView
from mergekit_ot.fusion.tensors import alignment_objective
from mergekit_ot.fusion.weight_rows import KeptProducts, agreement, agreement_found
from mergekit_ot.hooks.manager import default_manager
from mergekit_ot.hooks.preparing import prepare
from mergekit_ot.transport.measure import NeuronMeasure
from mergekit_ot.transport.solver import Scope

SIZES = (5, 12, 9, 3)
INPUTS = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Sequential(nn.Linear(*pair), nn.ReLU()) for pair in pairwise(SIZES)]
    return nn.Sequential(*layers).eval()


def view_of(models: list[nn.Module], order: list[int], kept: KeptProducts) -> GroupView:
    graph = trace_model(models[0], INPUTS)
    first, second = graph.free_groups
    orders = [torch.arange(9), torch.tensor(order)]
    couplings = {second: tuple(map(Permutation, orders)), first: (Permutation.identity(12),) * 2}
    states = [model.state_dict() for model in models]
    alignment = Alignment((graph, graph), graph, couplings)
    return GroupView(first, alignment, Scope.INCIDENT, lambda source, name: states[source][name], kept=kept)


def costs(view: GroupView) -> torch.Tensor:
    ours, theirs = (NeuronMeasure.uniform(view.rows(source)) for source in range(2))
    cost = measure_cost(ours, theirs)
    assert ours.joined is None
    assert theirs.joined is None
    return cost


def test_costs_from_products_are_those_of_joined_rows_whatever_was_kept():
    models, kept = [network(0), network(1)], KeptProducts()
    # All change, few change, none does, all change.
    for order in ([3, 0, 1, 2, 5, 6, 7, 8, 4], [3, 0, 1, 2, 5, 6, 7, 4, 8], [3, 0, 1, 2, 5, 6, 7, 4, 8], [*range(9)]):
        view = view_of(models, order, kept)
        torch.testing.assert_close(costs(view), ground_cost(view.weights(0), view.weights(1)), rtol=1e-5, atol=1e-5)
    assert len(kept.products) == 3


def setup_of(models: list[nn.Module], seed: int = 0):
    options = FusionOptions(solver="weight-matching", device="cpu", seed=seed)
    return prepare(FusionInputs(models, example_inputs=INPUTS), options, default_manager(), trace_model)


def test_agreement_is_what_permutations_change_in_the_objective():
    run = FusionRun(setup_of([network(seed) for seed in range(3)]))
    run.start = run.alignment
    run._align()
    weights = run.setup.model_weights
    identity = replace(
        run.alignment,
        couplings={
            key: tuple(Permutation.identity(run.alignment.target.groups[key].size) for _ in weights)
            for key in run.alignment.couplings
        },
    )
    fell = [alignment_objective(run.tensors, each, weights) for each in (identity, run.alignment)]
    rose = [agreement(run.tensors, each, weights) for each in (identity, run.alignment)]
    assert fell[0] > fell[1]
    assert abs((fell[0] - fell[1]) - 2 * (rose[1] - rose[0])) < 1e-5
    assert agreement_found([], run.alignment, run.tensors, weights) is None


def test_networks_that_stand_neuron_by_neuron_stay_so_and_strangers_are_matched_from_nothing():
    near = network(0)
    shifted = network(0)
    with torch.no_grad():
        for parameter in shifted.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    run = FusionRun(setup_of([near, shifted]))
    run.run()
    assert all(coupling.is_identity for pair in run.alignment.couplings.values() for coupling in pair)
