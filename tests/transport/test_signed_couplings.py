"""Couplings that negate neurons, or leave some without a partner: laws, against loops over the pairs of neurons."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from draws import Draw, pairs
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mergekit_ot import BarycenterProblem, NeuronMeasure, Permutation, Plan
from mergekit_ot.transport.barycenter import (
    averaged_support,
    barycenter_cost,
    fused_measure,
    in_order_of,
    transport_cost,
)

LAW = settings(deadline=None, max_examples=30)
SEEDS = st.integers(0, 10_000)
SIZES = st.integers(1, 5)


@LAW
@given(SIZES, SIZES, SEEDS)
def test_maps_are_those_of_the_pairs(rows, columns, seed):
    coupling = Draw(seed).coupling(rows, columns)
    like = torch.zeros(1, dtype=torch.float64)
    arriving, leaving = [0.0] * rows, [0.0] * columns
    for j, k, mass, _ in pairs(coupling):
        arriving[j] += mass
        leaving[k] += mass
    plan, average = (torch.zeros(rows, columns, dtype=torch.float64) for _ in range(2))
    split = torch.zeros(columns, rows, dtype=torch.float64)
    for j, k, mass, sign in pairs(coupling):
        plan[j, k] = mass * sign
        average[j, k] = mass * sign / arriving[j]
        split[k, j] = mass * sign / leaving[k]
    torch.testing.assert_close(coupling.signed_plan(like), plan)
    torch.testing.assert_close(coupling.average_map(like, is_signed=True), average)
    torch.testing.assert_close(coupling.split_map(like, is_signed=True), split)
    torch.testing.assert_close(coupling.transport_plan(like), plan.abs())
    torch.testing.assert_close(coupling.average_map(like), average.abs())
    torch.testing.assert_close(coupling.split_map(like), split.abs())
    tensor = Draw(seed + 1).gaussian(2, columns, 3)
    for reads, weights in ((False, average), (True, split.T)):
        moved = coupling.move(tensor, 1, reads, is_odd=True)
        torch.testing.assert_close(moved, torch.einsum("jk,akb->ajb", weights, tensor))
        moved = coupling.move(tensor, 1, reads)
        torch.testing.assert_close(moved, torch.einsum("jk,akb->ajb", weights.abs(), tensor))


@LAW
@given(SIZES, SIZES, SEEDS)
def test_targets_in_another_order_and_negated(rows, columns, seed):
    draw = Draw(seed)
    coupling, order, sign = draw.coupling(rows, columns), torch.randperm(rows), draw.sign(rows)
    assume(coupling.is_permutation or coupling.sign is not None)
    like = torch.zeros(1, dtype=torch.float64)
    plan = coupling.signed_plan(like)
    torch.testing.assert_close(coupling.in_order(order).signed_plan(like), plan[order])
    torch.testing.assert_close(coupling.negated(sign).signed_plan(like), sign[:, None] * plan)
    assert coupling.is_permutation == coupling.negated(sign).is_permutation == coupling.in_order(order).is_permutation


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_a_plan_without_signs_is_negated(columns):
    coupling = Plan(torch.full((3, columns), 1 / (3 * columns)))
    sign = torch.tensor([1.0, -1.0, -1.0])
    negated = coupling.negated(sign)
    torch.testing.assert_close(negated.signed_plan(), sign[:, None] * coupling.transport_plan())
    torch.testing.assert_close(negated.negated(sign).signed_plan(), coupling.transport_plan())


@LAW
@given(SIZES, st.integers(2, 4), SEEDS)
def test_in_the_order_and_signs_of_one_source(size, count, seed):
    draw = Draw(seed)
    reference = Permutation(torch.randperm(size, generator=draw.generator), sign=draw.sign(size))
    couplings = [reference, *(draw.coupling(size, size) for _ in range(count - 1))]
    ordered = in_order_of(couplings, 0)
    assert ordered[0].is_identity
    like = torch.zeros(1, dtype=torch.float64)
    # Who meets whom, and at which relative sign, stays.
    for before, after in zip(couplings, ordered, strict=True):
        kept = reference.signed_plan(like).T @ before.signed_plan(like)
        torch.testing.assert_close(ordered[0].signed_plan(like).T @ after.signed_plan(like), kept)


def test_signs_that_negate_nothing_are_none():
    assert Permutation(torch.tensor([1, 0]), sign=torch.ones(2)).sign is None
    assert Permutation(torch.arange(2), sign=torch.ones(2)).is_identity
    assert not Permutation(torch.arange(2), sign=torch.tensor([1.0, -1.0])).is_identity


def loops(problem, couplings):
    """The fused support and structure, pair by pair."""
    first = problem.measures[0]
    support = torch.zeros(problem.size, first.support.shape[1], dtype=torch.float64)
    structure = torch.zeros(first.structure.shape[0], problem.size, problem.size, dtype=torch.float64)
    share = torch.zeros(problem.size, dtype=torch.float64)
    for weight, measure, coupling in zip(problem.model_weights, problem.measures, couplings, strict=True):
        signs, held = measure.signs, pairs(coupling)
        arriving = [sum(mass for j, _, mass, _ in held if j == row) for row in range(problem.size)]
        leaving = [sum(mass for _, k, mass, _ in held if k == column) for column in range(measure.size)]
        for j in range(problem.size):
            share[j] += weight * (arriving[j] > 0)
        for j, k, mass, sign in held:
            for d in range(support.shape[1]):
                factor = sign if signs is not None and signs.columns[d] else 1.0
                support[j, d] += weight * mass / arriving[j] * factor * measure.support[k, d]
        for (j, k, mass, sign), (p, q, other, reading) in itertools.product(held, held):
            for s in range(structure.shape[0]):
                factor = sign if signs is not None and signs.rows[s] else 1.0
                factor *= reading if signs is not None and signs.readers[s] else 1.0
                value = factor * measure.structure[s, k, q]
                structure[s, j, p] += weight * mass / arriving[j] * other / leaving[q] * value
    share = torch.where(share > 0, share, torch.ones_like(share))
    return support / share[:, None], structure / share[:, None]


@LAW
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 4), st.booleans(), st.booleans(), SEEDS)
def test_the_fused_measure_is_the_mean_over_the_pairs(sizes, size, has_signs, is_partial, seed):
    draw = Draw(seed)
    signs = draw.signs(3, 2) if has_signs else None
    measures = tuple(draw.measure(count, 3, 2, signs) for count in sizes)
    weights = torch.rand(len(sizes), generator=draw.generator).double() + 0.1
    problem = BarycenterProblem(measures, tuple((weights / weights.sum()).tolist()), size)
    couplings = [draw.coupling(size, count, is_partial and place > 0) for place, count in enumerate(sizes)]
    before = [measure.support.clone() for measure in measures]
    found = fused_measure(problem, couplings)
    support, structure = loops(problem, couplings)
    torch.testing.assert_close(found.support, support)
    torch.testing.assert_close(found.structure, structure)
    assert found.signs is signs
    assert all(torch.equal(measure.support, kept) for measure, kept in zip(measures, before, strict=True))


@LAW
@given(SIZES, SIZES, SEEDS)
def test_presence_says_who_has_a_partner(rows, columns, seed):
    draw = Draw(seed)
    whole, partial = draw.coupling(rows, columns), draw.coupling(rows + 1, columns, is_partial=True)
    assert whole.presence() is None
    here = partial.presence(torch.zeros(1, dtype=torch.float64))
    held = {j for j, *_ in pairs(partial)}
    assert here is not None
    assert here.tolist() == [float(j in held) for j in range(rows + 1)]
    assert here.dtype == torch.float64


def test_a_neuron_without_a_partner_in_one_source_is_that_of_the_others():
    measures = tuple(NeuronMeasure.uniform(torch.tensor(rows)) for rows in ([[2.0], [4.0]], [[8.0]], [[16.0]]))
    plans = ([[0.5, 0.0], [0.0, 0.5], [0.0, 0.0]], [[0.0], [1.0], [0.0]], [[0.0], [0.0], [1.0]])
    problem = BarycenterProblem(measures, (0.5, 0.25, 0.25), size=3)
    fused = fused_measure(problem, [Plan(torch.tensor(plan)) for plan in plans])
    torch.testing.assert_close(fused.support, torch.tensor([[2.0], [(0.5 * 4 + 0.25 * 8) / 0.75], [16.0]]))


@LAW
@given(SIZES, SIZES, st.integers(0, 4), st.booleans(), SEEDS)
def test_the_transport_cost_is_the_sum_over_the_pairs(rows, columns, dimension, has_signs, seed):
    draw = Draw(seed)
    signs = draw.signs(dimension, 0) if has_signs else None
    target, source = draw.gaussian(rows, dimension), draw.gaussian(columns, dimension)
    coupling = draw.coupling(rows, columns)
    expected = 0.0
    for j, k, mass, sign in pairs(coupling):
        for d in range(dimension):
            factor = sign if signs is not None and signs.columns[d] else 1.0
            expected += mass * float(target[j, d] - factor * source[k, d]) ** 2
    assert transport_cost(coupling, target, source, signs) == pytest.approx(expected, abs=1e-12)
    if signs is not None and coupling.is_permutation:
        moved = averaged_support(coupling, NeuronMeasure.uniform(source, signs=signs))
        assert float((target - moved).square().sum()) / rows == pytest.approx(expected, abs=1e-12)


@LAW
@given(SIZES, st.lists(SIZES, min_size=1, max_size=3), SEEDS)
def test_the_fused_support_is_the_best_for_its_couplings(size, sizes, seed):
    draw = Draw(seed)
    signs = draw.signs(3, 0)
    problem = BarycenterProblem(
        tuple(draw.measure(count, 3, 0, signs) for count in sizes), (1 / len(sizes),) * len(sizes), size
    )
    plans = [draw.coupling(size, count) for count in sizes]
    # The closed form holds where every fused neuron has mass one over their number.
    plans = [c if isinstance(c, Permutation) else replace(c, matrix=c.average_map() / size) for c in plans]
    fused = fused_measure(problem, plans).support
    cost = barycenter_cost(problem, plans, fused)
    for _ in range(3):
        assert cost <= barycenter_cost(problem, plans, fused + 0.1 * draw.gaussian(size, 3)) + 1e-12
