"""Exchanges of partners, clear matches, pairs that are coupled once: laws, each against the form as written down."""

from __future__ import annotations

import itertools

import pytest
import torch
from draws import Draw
from mergeot_gromov import descent
from mergeot_gromov.exchange import exchange
from mergeot_gromov.pairwise import FusedGromov
from mergeot_gromov.search import frank_wolfe, frank_wolfe_from, is_clear, starting_points
from mergeot_gromov.solver import GromovBarycenterSolver
from mergeot_gromov.starts import FoundPairs
from planted import planted_permutation

from mergekit_ot import BarycenterProblem, NeuronMeasure, Permutation, Signs
from mergekit_ot.testing import permuted, random_problem


def pair_of(size: int, seed: int, has_signs: bool) -> FusedGromov:
    draw = Draw(seed)
    signs = Signs(torch.tensor([True, False, True]), torch.tensor([True, False]), torch.tensor([False, True]))
    measures = [draw.measure(size, 3, 2, signs if has_signs else None) for _ in range(2)]
    return FusedGromov(measures[0], measures[1], alpha=1.3, is_half=False)


def exchanged(coupling: Permutation, one: int, other: int) -> Permutation:
    order = torch.arange(coupling.target_size)
    order[one], order[other] = other, one
    return coupling.in_order(order)


@pytest.mark.parametrize("has_signs", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_no_exchange_improves_on_the_end_of_all(seed: int, has_signs: bool) -> None:
    pair, draw = pair_of(7, seed, has_signs), Draw(seed)
    order = torch.randperm(7, generator=draw.generator)
    start = pair.at(Permutation(order, draw.sign(7) if has_signs else None))
    end = exchange(pair, start, 100)
    assert pair.objective(end) < pair.objective(start)
    assert isinstance(end.coupling, Permutation)
    for one, other in itertools.combinations(range(7), 2):
        assert pair.objective(pair.at(exchanged(end.coupling, one, other))) >= pair.objective(end) - 1e-9
    assert exchange(pair, end, 100) is end


def distances(measure: NeuronMeasure) -> NeuronMeasure:
    return NeuronMeasure.uniform(measure.support, torch.cdist(measure.support, measure.support)[None])


@pytest.mark.parametrize("seed", range(3))
def test_no_exchange_improves_on_the_end_of_all_by_distances(seed: int) -> None:
    draw = Draw(seed)
    measures = [distances(draw.measure(9, 3, 1, None)) for _ in range(2)]
    pair = FusedGromov(measures[0], measures[1], alpha=4.0, is_half=False)
    assert pair.is_symmetric
    end = exchange(pair, pair.at(Permutation(torch.randperm(9, generator=draw.generator))), 100)
    assert isinstance(end.coupling, Permutation)
    for one, other in itertools.combinations(range(9), 2):
        assert pair.objective(pair.at(exchanged(end.coupling, one, other))) >= pair.objective(end) - 1e-9


@pytest.mark.parametrize("has_signs", [False, True])
@pytest.mark.parametrize("moving", [0, 2, 3, 12])
def test_a_point_in_another_order_is_that_of_the_coupling_in_it(moving: int, has_signs: bool) -> None:
    pair, draw = pair_of(12, 2, has_signs), Draw(4)
    coupling = Permutation(torch.randperm(12, generator=draw.generator), draw.sign(12) if has_signs else None)
    order = torch.arange(12)
    order[:moving] = order[:moving].roll(1)
    found, expected = pair.exchanged(pair.at(coupling), coupling, order), pair.at(coupling.in_order(order))
    assert found.as_coupling().is_same(expected.as_coupling())
    for one, other in ((found.forward, expected.forward), (found.backward, expected.backward)):
        torch.testing.assert_close(one.even, other.even)
        if has_signs:
            torch.testing.assert_close(one.odd, other.odd)
    torch.testing.assert_close(found.plan, expected.plan)
    torch.testing.assert_close(found.signed, expected.signed)


def test_distances_of_different_sizes_end_lower_with_bapg_on_the_whole() -> None:
    gains = []
    for seed in range(3):
        draw = Draw(seed)
        measures = tuple(distances(draw.measure(size, 3, 1, None)) for size in (10, 16))
        problem = BarycenterProblem(measures, (0.5, 0.5), 10)
        every, without = (GromovBarycenterSolver(epsilon=epsilon).solve(problem).cost for epsilon in (0.1, 0.0))
        gains.append(without - every)
    assert sum(gains) > 1e-3


@pytest.mark.parametrize("has_signs", [False, True])
def test_runs_side_by_side_end_where_each_ends_alone(has_signs: bool) -> None:
    pair = pair_of(8, 1, has_signs)
    starts = list(starting_points(pair, 3))
    together = frank_wolfe_from(pair, starts, 50)
    assert len(together) == len(starts) == 6
    for start, end in zip(starts, together, strict=True):
        alone = frank_wolfe(pair, start, 50)
        torch.testing.assert_close(end.plan, alone.plan)
        torch.testing.assert_close(end.signed, alone.signed)
        assert (end.coupling is None) == (alone.coupling is None)
        assert pair.objective(end) == pytest.approx(pair.objective(alone))


def test_a_planted_order_is_clear_and_the_best_of_unrelated_networks_is_not() -> None:
    problem, planted = planted_permutation(64, 1.0, dimension=0, seed=0)
    pair = FusedGromov(*problem.measures, alpha=1.0, is_half=False)
    assert is_clear(pair, pair.at(planted))
    assert not is_clear(pair, pair.at(Permutation.identity(64)))
    for seed in range(3):
        others = [planted_permutation(64, 0.0, 0, seed=each)[0].measures[0] for each in (seed, 100 + seed)]
        pair = FusedGromov(others[0], others[1], alpha=1.0, is_half=False)
        found = GromovBarycenterSolver(alpha=1.0, random_starts=0)._search(others[0], others[1])
        assert not is_clear(pair, pair.at(found))


@pytest.mark.parametrize("is_planted", [False, True])
def test_each_pair_of_sources_is_coupled_once(monkeypatch: pytest.MonkeyPatch, is_planted: bool) -> None:
    searches: list[int] = []

    def counted(pair, random_starts=0):
        searches.append(random_starts)
        return starting_points(pair, random_starts)

    monkeypatch.setattr(descent, "starting_points", counted)
    problem = random_problem((24,) * 4, dimension=2, slices=1, seed=0)
    if is_planted:
        first = problem.measures[0]
        orders = [torch.randperm(24, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
        problem = BarycenterProblem((first, *(permuted(first, order) for order in orders)), (0.25,) * 4, 24)
    found = GromovBarycenterSolver(random_starts=1).solve(problem)
    # Clear matches need neither Frank-Wolfe nor another start; else the first start alone has random ones.
    assert searches == ([] if is_planted else [1, 1, 1, 0, 0, 0])
    if is_planted:
        assert found.cost == pytest.approx(0, abs=1e-9)


def test_the_other_way_about_is_the_inverse() -> None:
    found, order = FoundPairs(), torch.tensor([2, 0, 1])
    sign = torch.tensor([1.0, -1.0, 1.0])
    found.add(0, 1, Permutation(order, sign), is_clear=True)
    inverse = found.inverse(1, 0)
    assert inverse is not None
    measure = NeuronMeasure.uniform(torch.randn(3, 2, generator=torch.Generator().manual_seed(0)))
    signs = Signs(torch.tensor([True, True]), torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.bool))
    there = Permutation(order, sign).move_support(measure.support, signs)
    assert torch.equal(inverse.move_support(there, signs), measure.support)
    assert found.inverse(0, 1) is None
    assert found.inverse(None, 0) is None
