"""Fused Gromov-Wasserstein where neurons may be negated: the four-index form, and all signed permutations."""

from __future__ import annotations

import itertools

import pytest
import torch
from draws import Draw
from hypothesis import given, settings
from hypothesis import strategies as st
from mergeot_gromov.pairwise import FusedGromov
from mergeot_gromov.solver import GromovBarycenterSolver

from mergekit_ot import BarycenterProblem, Permutation, Signs

LAW = settings(deadline=None, max_examples=30)
SEEDS = st.integers(0, 10_000)


def four_index(target, source, positive, negative, alpha):
    """The fused objective as it is written down, for the part of a plan at either sign."""
    size, count = positive.shape
    signs, value = source.signs, 0.0
    for sign, layer in ((1.0, positive), (-1.0, negative)):
        factor = torch.where(signs.columns, sign, 1.0)
        value = value + (layer * (target.support[:, None] - factor * source.support).square().sum(2)).sum()
        for reading, other in ((1.0, positive), (-1.0, negative)):
            both = torch.where(signs.rows, sign, 1.0) * torch.where(signs.readers, reading, 1.0)
            moved = count * both[:, None, None] * source.structure
            difference = size * target.structure[:, :, None, :, None] - moved[:, None, :, None, :]
            value = value + alpha * torch.einsum("sjkpq,jk,pq->", difference.square(), layer, other) / size
    return value


@LAW
@given(st.integers(2, 5), st.integers(2, 5), st.integers(1, 3), SEEDS)
def test_objective_and_gradient_are_those_of_the_four_index_form(rows, columns, slices, seed):
    draw = Draw(seed)
    signs = draw.signs(3, slices)
    target, source = draw.measure(rows, 3, slices, signs), draw.measure(columns, 3, slices, signs)
    pair = FusedGromov(target, source, alpha=0.7, is_half=False)
    layers = torch.rand(2, rows, columns, generator=draw.generator, dtype=torch.float64) + 0.05
    for _ in range(200):
        layers = layers / layers.sum((0, 2), keepdim=True) / rows
        layers = layers / layers.sum((0, 1), keepdim=True) / columns
    layers.requires_grad_()
    value = four_index(target, source, layers[0], layers[1], 0.7)
    (gradient,) = torch.autograd.grad(value, layers)
    point = pair.between((layers[0] + layers[1]).detach(), (layers[0] - layers[1]).detach())
    assert pair.objective(point) == pytest.approx(float(value.detach()))
    slope = pair.gradient(point)
    assert slope.odd is not None
    difference = torch.stack([slope.even + slope.odd, slope.even - slope.odd]) - gradient
    # Equal on the polytope, whose marginals sum over both signs: up to a function of the row plus one of the column.
    rows_part, columns_part = difference.mean((0, 2), keepdim=True), difference.mean((0, 1), keepdim=True)
    assert (difference - rows_part - columns_part + difference.mean()).abs().max() < 1e-9
    # The cost of a pair leaves no such function out.
    cost, sign = pair.pair_cost(point)
    best = gradient.min(0)
    torch.testing.assert_close(cost, best.values, rtol=0, atol=1e-9)
    assert sign is not None
    is_clear = (gradient[0] - gradient[1]).abs() > 1e-9
    assert torch.equal(sign[is_clear], (1.0 - 2.0 * best.indices)[is_clear].to(sign))


@LAW
@given(st.integers(2, 5), st.integers(1, 2), SEEDS)
def test_the_line_between_two_couplings_is_that_of_the_objective(size, slices, seed):
    draw = Draw(seed)
    signs = draw.signs(2, slices)
    pair = FusedGromov(*(draw.measure(size, 2, slices, signs) for _ in range(2)), alpha=1.3, is_half=False)
    ends = [Permutation(torch.randperm(size, generator=draw.generator), sign=draw.sign(size)) for _ in range(2)]
    start, end = map(pair.at, ends)
    slope, curvature = pair.line(start, end)
    for step in (0.0, 0.3, 1.0):
        expected = pair.objective(start) + slope * step + curvature * step**2
        mixed = pair.between(torch.lerp(start.plan, end.plan, step), torch.lerp(start.signed, end.signed, step))
        assert pair.objective(mixed) == pytest.approx(expected)
        assert pair.objective(start.mixed(end, step)) == pytest.approx(expected)


def signed_permutation_cost(problem, coupling, alpha):
    """The objective of two sources, the first as it stands, after eliminating the barycenter."""
    first, second = problem.measures
    index, sign, signs = coupling.index, coupling.sign, first.signs
    sign = torch.ones(index.numel()).double() if sign is None else sign.double()
    support = second.support[index] * torch.where(signs.columns, sign[:, None], 1.0)
    factor = torch.where(signs.rows[:, None, None], sign[:, None], 1.0)
    factor = factor * torch.where(signs.readers[:, None, None], sign, 1.0)
    structure = second.structure[:, index][:, :, index] * factor
    spread = (first.support - support).square().sum() + alpha * (first.structure - structure).square().sum()
    return problem.model_weights[0] * problem.model_weights[1] * float(spread) / index.numel()


@pytest.mark.parametrize(("size", "least_hits"), [(1, 10), (2, 9), (3, 8), (4, 8)])
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_the_optimum_over_all_signed_permutations_is_found(size, least_hits, alpha):
    hits = 0
    for seed in range(10):
        draw = Draw(seed)
        signs = Signs(torch.tensor([True, True, False]), torch.tensor([True]), torch.tensor([True]))
        problem = BarycenterProblem(tuple(draw.measure(size, 3, 1, signs) for _ in range(2)), (0.4, 0.6), size)
        best = min(
            signed_permutation_cost(
                problem, Permutation(torch.tensor(order), sign=torch.tensor(sign, dtype=torch.float64)), alpha
            )
            for order in itertools.permutations(range(size))
            for sign in itertools.product((1.0, -1.0), repeat=size)
        )
        found = GromovBarycenterSolver(alpha=alpha).solve(problem)
        assert found.couplings[0].is_identity
        assert found.cost == pytest.approx(signed_permutation_cost(problem, found.couplings[1], alpha))
        assert found.cost >= best - 1e-9
        hits += found.cost <= best + 1e-9
    assert hits >= least_hits
