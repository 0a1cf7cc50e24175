"""Neurons without a partner kept apart: who is placed where, against all placements, and whole networks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from draws import Draw
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Cnn, Mlp
from signed import SEQUENCES, Recurrent, randomised, traced_once
from torch import Tensor, nn

from mergekit_ot import (
    BarycenterProblem,
    Coupling,
    NeuronMeasure,
    Permutation,
    Plan,
    couple_apart,
    fuse,
    placed_measure,
    support_merge_cost,
)
from mergekit_ot.transport import apart

LAW = settings(deadline=None, max_examples=30)
SEEDS = st.integers(0, 10_000)


def problem_of(sizes: list[int], size: int, seed: int, columns: int = 2) -> BarycenterProblem:
    draw = Draw(seed)
    weights = torch.rand(len(sizes), generator=draw.generator) + 0.2
    measures = tuple(draw.measure(count, columns, 0, None) for count in sizes)
    return BarycenterProblem(measures, tuple((weights / weights.sum()).double().tolist()), size)


def placed(problem: BarycenterProblem) -> tuple[Coupling, ...]:
    return couple_apart([measure.size for measure in problem.measures], problem.size, support_merge_cost(problem))


def places_of(coupling: Coupling) -> list[int]:
    """The fused neuron of every source neuron."""
    plan = coupling.transport_plan()
    assert bool(((plan > 0).sum(0) == 1).all())
    assert bool(((plan > 0).sum(1) <= 1).all())
    torch.testing.assert_close(plan.sum(0), torch.full((plan.shape[1],), 1 / plan.shape[1], dtype=plan.dtype))
    return plan.argmax(0).tolist()


def spread(problem: BarycenterProblem, placements: list[list[int]]) -> float:
    """What the sources leave apart: every neuron's squared distance to the mean of those it shares a place with."""
    total = 0.0
    for place in range(problem.size):
        here = [
            (weight, measure.support[where.index(place)])
            for weight, measure, where in zip(problem.model_weights, problem.measures, placements, strict=True)
            if place in where
        ]
        if here:
            mean = sum(weight * row for weight, row in here) / sum(weight for weight, _ in here)
            total += sum(weight * float((row - mean).square().sum()) for weight, row in here)
    return total


@LAW
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(0, 6), SEEDS)
def test_every_neuron_has_a_place_and_as_few_as_can_be_share_one(sizes: list[int], room: int, seed: int) -> None:
    problem = problem_of(sizes, max(sizes) + room, seed)
    placements = [places_of(coupling) for coupling in placed(problem)]
    used = {place for where in placements for place in where}
    assert len(used) == min(problem.size, sum(sizes))


def assert_best(first: int, second: int, size: int, seed: int) -> None:
    problem = problem_of([first, second], size, seed)
    found = [places_of(coupling) for coupling in placed(problem)]
    assert len(set(found[0]) & set(found[1])) == first + second - size
    own = list(range(first))
    best = min(
        spread(problem, [own, list(other)])
        for other in itertools.permutations(range(size), second)
        if len(set(own) | set(other)) == size
    )
    assert spread(problem, found) == pytest.approx(best, abs=1e-9)


@LAW
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), SEEDS)
def test_two_sources_share_where_it_costs_least(first: int, second: int, room: int, seed: int) -> None:
    size = min(max(first, second) + room, first + second)
    assert_best(first, second, size, seed)


def test_a_source_goes_where_it_costs_least_in_a_group_that_the_other_fills() -> None:
    for seed in range(20):
        assert_best(4, 2, 4, seed)


def test_the_mean_of_the_sources_placed_is_a_mean() -> None:
    problem = problem_of([3, 2], 3, 0)
    fused, weight = placed_measure(problem, [Permutation.identity(3), None])
    torch.testing.assert_close(fused.support, problem.measures[0].support)
    torch.testing.assert_close(weight, torch.full_like(weight, problem.model_weights[0]))


@LAW
@given(SEEDS)
def test_what_sharing_costs_is_what_it_adds_to_the_spread(seed: int) -> None:
    problem = problem_of([3, 2, 2], 4, seed)
    first, second = (Plan(torch.eye(4)[:, places] / len(places)) for places in ([0, 1, 2], [3, 0]))
    cost, sign = support_merge_cost(problem)([first, second, None], 2, torch.arange(4))
    assert sign is None
    before = spread(problem, [[0, 1, 2], [3, 0], []])
    for place, neuron in itertools.product(range(4), range(2)):
        alone = NeuronMeasure.uniform(problem.measures[2].support[neuron][None])
        with_it = replace(problem, measures=(*problem.measures[:2], alone))
        rise = spread(with_it, [[0, 1, 2], [3, 0], [place]]) - before
        assert float(cost[place, neuron]) == pytest.approx(rise, abs=1e-9)


def test_three_sources_are_never_worse_than_after_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    gains = 0
    for seed in range(15):
        problem = problem_of([4, 5, 3], 6 + seed % 3, seed)
        full = spread(problem, [places_of(coupling) for coupling in placed(problem)])
        with monkeypatch.context() as patched:
            patched.setattr(apart, "_ROUNDS", 1)
            once = spread(problem, [places_of(coupling) for coupling in placed(problem)])
        assert full <= once + 1e-9
        gains += full < once - 1e-6
    assert gains > 0


def test_a_source_of_no_weight_goes_where_it_fits() -> None:
    problem = problem_of([3, 3], 4, 0)
    near = NeuronMeasure.uniform(problem.measures[0].support + 1e-3)
    moved = BarycenterProblem((problem.measures[0], near), (1.0, 0.0), 4)
    ours, theirs = map(places_of, placed(moved))
    assert sum(one == other for one, other in zip(ours, theirs, strict=True)) == 2
    fused, weight = placed_measure(moved, placed(moved))
    assert sorted(weight.tolist()) == [0.0, 1.0, 1.0, 1.0]
    torch.testing.assert_close(fused.support[ours], moved.measures[0].support)


def test_signs_are_those_that_the_pairs_cost_least_at() -> None:
    def cost(couplings: object, source: int, occupied: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - torch.eye(2)[occupied], torch.tensor([[-1.0, 1.0], [1.0, 1.0]])[occupied]

    first, second = couple_apart([2, 2], 2, cost)
    assert first.sign is None
    assert second.signed_plan().tolist() == [[-0.5, 0.0], [0.0, 0.5]]


Make = Callable[[int], nn.Module]

pytestmark = pytest.mark.usefixtures(traced_once.__name__)

IMAGES = torch.randn(3, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
VECTORS = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def mlp(width: int) -> nn.Module:
    return randomised(Mlp((6, width, width + 1, 3)), width).double()


def cnn(width: int) -> nn.Module:
    model = randomised(Cnn(width, width + 1, width + 2), width).double()
    generator = torch.Generator().manual_seed(width)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + (0.5 if "var" in name else 0.0))
    return model


def wide(make: Make, first: int, second: int) -> nn.Module:
    """An architecture in which each group is as large as those of two sources together."""
    together = {
        mlp: lambda: Mlp((6, first + second, first + second + 2, 3)),
        cnn: lambda: Cnn(first + second, first + second + 2, first + second + 4),
        rnn: lambda: Recurrent(nn.RNN, first + second),
        lstm: lambda: Recurrent(nn.LSTM, first + second),
    }
    return together[make]().double().eval()


def rnn(width: int) -> nn.Module:
    return randomised(Recurrent(nn.RNN, width), width).double()


def lstm(width: int) -> nn.Module:
    return randomised(Recurrent(nn.LSTM, width), width).double()


CASES: list[tuple[Make, Tensor, str]] = [
    (mlp, VECTORS, "wb"),
    (mlp, VECTORS, "gwb"),
    (cnn, IMAGES, "wb"),
    (rnn, SEQUENCES.double(), "gwb"),
    (lstm, SEQUENCES.double(), "gwb"),
]


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())


@pytest.mark.parametrize(("make", "inputs", "solver"), CASES)
def test_as_wide_as_both_together_two_networks_are_their_ensemble(make: Make, inputs: Tensor, solver: str) -> None:
    models = [make(4), make(5)]
    weights = [0.3, 0.7]
    options = {"solver": solver, "example_inputs": inputs, "model_weights": weights}
    result = fuse(models, target=wide(make, 4, 5), **options)
    expected = sum(weight * model(inputs) for weight, model in zip(weights, models, strict=True))
    assert difference(result.model()(inputs), expected) < 1e-12


@pytest.mark.parametrize(("make", "inputs", "solver"), CASES)
def test_with_less_room_aligned_sources_compute_what_the_sources_compute(
    make: Make, inputs: Tensor, solver: str
) -> None:
    models = [make(4), make(6)]
    target = 1 if make is mlp else wide(make, 4, 3)
    result = fuse(models, solver=solver, example_inputs=inputs, target=target)
    assert result.aligned_sources_max_error is not None
    assert result.aligned_sources_max_error < 1e-12
    assert torch.isfinite(result.model()(inputs)).all()


@pytest.mark.parametrize(("make", "inputs", "solver"), [CASES[0], CASES[2], CASES[4]])
def test_a_network_fused_with_itself_into_a_wider_one_is_itself(make: Make, inputs: Tensor, solver: str) -> None:
    model = make(4)
    result = fuse([model, model], solver=solver, example_inputs=inputs, target=wide(make, 3, 3))
    assert difference(result.model()(inputs), model(inputs)) < 1e-12


@pytest.mark.parametrize(("make", "inputs", "solver"), [CASES[1], CASES[2], CASES[3]])
def test_one_network_is_widened_with_its_function(make: Make, inputs: Tensor, solver: str) -> None:
    model = make(4)
    result = fuse([model], solver=solver, example_inputs=inputs, target=wide(make, 3, 4))
    assert difference(result.model()(inputs), model(inputs)) < 1e-12


@pytest.mark.parametrize("solver", ["wb", "gwb"])
def test_where_none_are_kept_apart_the_marginals_are_the_masses(solver: str) -> None:
    result = fuse(
        [mlp(4), mlp(5)],
        solver=solver,
        solver_options={"keep_apart": False},
        example_inputs=VECTORS,
        target=wide(mlp, 4, 5),
    )
    for couplings in result.alignment.couplings.values():
        for coupling in couplings:
            assert isinstance(coupling, Coupling)
            assert coupling.presence() is None
            for marginal in (coupling.target_marginal(VECTORS), coupling.source_marginal(VECTORS)):
                torch.testing.assert_close(marginal, torch.full_like(marginal, 1 / marginal.numel()))


@pytest.mark.parametrize(("make", "inputs", "solver"), [CASES[0], CASES[3]])
def test_refinement_leaves_them_apart(make: Make, inputs: Tensor, solver: str) -> None:
    models = [make(4), make(5)]
    options = {"solver": solver, "example_inputs": inputs, "refine": True}
    result = fuse(models, target=wide(make, 4, 5), **options)
    expected = sum(0.5 * model(inputs) for model in models)
    assert difference(result.model()(inputs), expected) < 1e-12
    # The objective of the whole compares nothing where neurons stand alone.
    assert result.objectives == {}
    assert (fuse(models, target=1, **options).aligned_sources_max_error or 0.0) < 1e-12
