"""The solver `zip`: clusters of neurons, held to brute force, to matching, and to networks that hold neurons twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergeot_matching.solver import ActivationMatchingSolver
from mergeot_matching.zipping import ZipSolver
from torch import Tensor, nn

from mergekit_ot import SolverError, fuse
from mergekit_ot.testing import check_solver, random_problem
from mergekit_ot.transport.measure import NeuronMeasure
from mergekit_ot.transport.plan import Plan
from mergekit_ot.transport.problem import Barycenter, BarycenterProblem, Status

LAW = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 10_000)


def clusters_of(found: Barycenter) -> Tensor:
    """Returns the fused neuron of every source neuron, one source after the other."""
    plans = [coupling.transport_plan(torch.empty(0)) for coupling in found.couplings]
    for plan in plans:
        assert ((plan > 0).sum(0) == 1).all()
    return torch.cat([plan.argmax(0) for plan in plans])


def apart(problem: BarycenterProblem, clusters: Tensor) -> float:
    """Returns the squared distances of all neurons to the means of their clusters, each at its mass."""
    rows = torch.cat([measure.support for measure in problem.measures]).double()
    weights = zip(problem.model_weights, problem.measures, strict=True)
    mass = torch.cat([weight * measure.mass.double() for weight, measure in weights])
    total = 0.0
    for number in clusters.unique():
        here, own = rows[clusters == number], mass[clusters == number]
        total += float((own * (here - own @ here / own.sum()).square().sum(1)).sum())
    return total


@pytest.mark.parametrize("steps", [0, 20])
def test_contract(steps):
    check_solver(ZipSolver(max_steps=steps))


@LAW
@given(st.integers(2, 3), st.integers(2, 9), SEEDS)
def test_it_costs_no_more_than_matching(count, size, seed):
    problem = random_problem((size,) * count, dimension=3, seed=seed)
    matched = ActivationMatchingSolver().solve(problem)
    assert ZipSolver().solve(problem).cost <= matched.cost * (1 + 1e-6)


@LAW
@given(st.lists(st.integers(2, 7), min_size=2, max_size=3), st.integers(2, 9), SEEDS)
def test_no_neuron_is_better_off_elsewhere(sizes, size, seed):
    problem = random_problem(sizes, dimension=3, seed=seed, size=size)
    found = ZipSolver().solve(problem)
    clusters = clusters_of(found)
    assert len(clusters.unique()) == min(size, sum(sizes))
    assert found.status is Status.CONVERGED
    least = apart(problem, clusters)
    for neuron in range(len(clusters)):
        if (clusters == clusters[neuron]).sum() > 1:
            for other in range(size):
                moved = clusters.clone()
                moved[neuron] = other
                assert apart(problem, moved) >= least * (1 - 1e-6)


def test_what_one_source_has_twice_makes_room_for_the_other():
    """Each source is a network of half the width with every neuron twice: fused, the width holds both networks."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 5, generator=generator)
    sources = [twice(narrow(generator), generator) for _ in range(2)]
    mean = torch.stack([source(inputs) for source in sources]).mean(0)
    errors = {}
    for solver in ("zip", "activation-matching"):
        result = fuse(sources, solver=solver, data=[(batch,) for batch in inputs.split(50)], device="cpu")
        fused = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3))
        fused.load_state_dict(result.state)
        errors[solver] = float((fused(inputs) - mean).detach().abs().max())
    assert errors["zip"] < 1e-5
    assert errors["activation-matching"] > 0.05


def narrow(generator: torch.Generator) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return net


def twice(net: nn.Sequential, generator: torch.Generator) -> nn.Sequential:
    """Returns a network of the same function that has every hidden neuron twice, in random order."""
    order = torch.randperm(12, generator=generator)
    wide = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3))
    with torch.no_grad():
        wide[0].weight.copy_(net[0].weight.repeat(2, 1)[order])
        wide[0].bias.copy_(net[0].bias.repeat(2)[order])
        wide[2].weight.copy_(net[2].weight.repeat(1, 2)[:, order] / 2)
        wide[2].bias.copy_(net[2].bias)
    return wide


def test_sources_of_no_weight_are_coupled_and_change_nothing():
    problem = random_problem((5, 5, 4), dimension=3, seed=3, model_weights=(0.5, 0.5, 0.0))
    pair = replace(problem, measures=problem.measures[:2], model_weights=(0.5, 0.5))
    found, alone = ZipSolver().solve(problem), ZipSolver().solve(pair)
    torch.testing.assert_close(found.measure.support, alone.measure.support)
    assert found.couplings[2].source_size == 4


def test_equal_neurons_still_make_as_many_clusters_as_are_wanted():
    measures = tuple(NeuronMeasure.uniform(torch.ones(4, 2)) for _ in range(2))
    found = ZipSolver().solve(BarycenterProblem(measures, (0.5, 0.5), size=3))
    assert len(clusters_of(found).unique()) == 3
    assert found.cost == pytest.approx(0.0, abs=1e-6)


def test_other_solvers_may_not_spread_a_source_unevenly():
    """Masses are free where a solver says so, and only there."""

    class Uneven(ZipSolver):
        name = "uneven"
        has_free_masses = False

    rows = torch.tensor([[0.0], [0.0], [5.0]])
    problem = BarycenterProblem((NeuronMeasure.uniform(rows),) * 2, (0.5, 0.5), size=2)
    assert any(isinstance(coupling, Plan) for coupling in ZipSolver().solve(problem).couplings)
    with pytest.raises(SolverError, match="misses its marginals"):
        Uneven().solve(problem)


def normed() -> nn.Sequential:
    hidden = [layer for _ in range(3) for layer in (nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(16, 4))


def test_statistics_are_re_estimated_behind_it():
    """The control of `reset` takes the source as it was given: clusters do not keep its function."""
    torch.manual_seed(0)
    inputs = torch.randn(400, 16)
    nets = [normed() for _ in range(2)]
    for net in nets:
        for norm in (net[1], net[4], net[7]):
            norm.momentum = None
        net(inputs)
        net.eval()
    batches = [(batch,) for batch in inputs.split(100)]
    plain = fuse(nets, solver="zip", data=batches, device="cpu")
    result = fuse(nets, solver="zip", repair="reset", data=batches, device="cpu")
    assert any(isinstance(coupling, Plan) for pair in plain.alignment.couplings.values() for coupling in pair)
    assert not torch.allclose(result.state["4.running_mean"], plain.state["4.running_mean"], atol=0.05)


@LAW
@given(st.integers(1, 4), st.integers(2, 4), SEEDS)
def test_there_are_as_many_clusters_as_are_wanted(size, count, seed):
    """Down to one of all: some versions of SciPy cut a tree at one cluster into two."""
    found = ZipSolver(max_steps=0).solve(random_problem((size,) * count, size=1, seed=seed))
    assert [coupling.target_size for coupling in found.couplings] == [1] * count
