"""Entropic couplings by Newton steps on the dual: laws, POT, and how few points are looked at."""

from __future__ import annotations

import itertools
import math

import numpy as np
import ot
import pytest
import torch
from mergeot_wasserstein.dual import SemiDual
from mergeot_wasserstein.entropic import Potentials, sinkhorn
from mergeot_wasserstein.solver import WassersteinBarycenterSolver
from torch import Tensor

from mergekit_ot import ground_cost, uniform_mass
from mergekit_ot.testing import random_problem

# Below and above the size from which on conjugate gradients are tried.
SIZES = (24, 130)


def unrelated_cost(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(size, 20, generator=generator, dtype=torch.float64) for size in (rows, columns))
    return ground_cost(first, second)


def masses(cost: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = (uniform_mass(size, cost) for size in cost.shape)
    return rows, columns


@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("epsilon", [0.5, 0.05])
def test_plans_are_those_of_pot(columns: int, epsilon: float) -> None:
    cost = unrelated_cost(40, columns)
    target = torch.rand(40, dtype=torch.float64) + 0.1
    target, source = target / target.sum(), masses(cost)[1]
    plan = sinkhorn(cost, target, source, epsilon).numpy()
    scaled = epsilon * float(cost.mean())
    found = ot.sinkhorn(target.numpy(), source.numpy(), cost.numpy(), scaled, "sinkhorn_log", 20_000, 1e-12)
    np.testing.assert_allclose(plan, found, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_the_derivative_of_the_objective_is_what_the_masses_lack(size: int) -> None:
    cost = unrelated_cost(size, size)
    dual = SemiDual(cost / cost.mean(), *masses(cost))
    point = dual.at(torch.linspace(0, 0.1, size, dtype=torch.float64), 0.05)
    torch.testing.assert_close(point.plan.sum(1), dual.target)
    torch.testing.assert_close(point.plan.sum(0), point.sums)
    step = 1e-6
    for place in (0, size - 1):
        columns = point.columns.clone()
        columns[place] += step
        slope = (dual.at(columns, 0.05).value - point.value) / step
        assert slope == pytest.approx(float((dual.source - point.sums)[place]), rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_masses_whose_sums_differ_by_rounding_are_no_obstacle(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    looked, real = [], SemiDual.at
    monkeypatch.setattr(SemiDual, "at", lambda *given: (looked.append(1), real(*given))[1])
    cost = unrelated_cost(256, 384, seed).float()
    assert float(sum(mass.double().sum() for mass in masses(cost))) != 2
    sinkhorn(cost, *masses(cost), 0.1)
    assert len(looked) < 15


@pytest.mark.parametrize("kind", ["unrelated", "noisy", "clustered"])
@pytest.mark.parametrize("size", SIZES)
def test_few_points_are_looked_at(monkeypatch: pytest.MonkeyPatch, size: int, kind: str) -> None:
    """Scaling needs thousands of rounds for the first of these, and does not end for the last."""
    looked, real = [], SemiDual.at
    monkeypatch.setattr(SemiDual, "at", lambda *given: (looked.append(1), real(*given))[1])
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(size, 20, generator=generator, dtype=torch.float64)
    others = torch.randn(size, 20, generator=generator, dtype=torch.float64)
    if kind == "noisy":
        others = rows[torch.randperm(size, generator=generator)] + 0.2 * others
    if kind == "clustered":
        rows[::2], others[::3] = rows[::2] + 9, others[::3] + 9
    cost = ground_cost(rows, others)
    dual_error = SemiDual(cost / cost.mean(), *masses(cost))
    potentials = Potentials()
    sinkhorn(cost, *masses(cost), 0.01, potentials)
    assert len(looked) < (25 if kind == "noisy" else 80)
    assert potentials.columns is not None
    assert dual_error.at(potentials.columns / cost.mean(), 0.01).error < 1e-5


def test_kept_potentials_change_what_is_looked_at_and_not_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = unrelated_cost(60, 130)
    near = cost + 1e-4 * unrelated_cost(60, 130, seed=3)
    potentials = Potentials()
    sinkhorn(cost, *masses(cost), 0.02, potentials)
    looked, real = [], SemiDual.at
    monkeypatch.setattr(SemiDual, "at", lambda *given: (looked.append(1), real(*given))[1])
    warm = sinkhorn(near, *masses(cost), 0.02, potentials)
    warm_looks = len(looked)
    cold = sinkhorn(near, *masses(cost), 0.02)
    torch.testing.assert_close(warm, cold, atol=1e-7, rtol=0)
    assert warm_looks < (len(looked) - warm_looks) / 2


def test_neurons_without_mass_take_no_part() -> None:
    cost = unrelated_cost(6, 8)
    target, source = masses(cost)
    source = torch.where(torch.arange(8) % 2 == 0, 2 * source, torch.zeros_like(source))
    plan = sinkhorn(cost, target, source, 0.05)
    assert float(plan[:, 1::2].abs().sum()) == 0
    torch.testing.assert_close(
        plan[:, ::2], sinkhorn(cost[:, ::2] / cost.mean(), target, source[::2], 0.05 / scale(cost))
    )


def scale(cost: Tensor) -> float:
    """The mean of the columns that have mass, where that of all is one."""
    return float(cost[:, ::2].mean() / cost.mean())


@pytest.mark.parametrize("epsilon", [1e-3, 1e-6, 1e-9, 1e-11])
@pytest.mark.parametrize("shape", [(30, 30), (20, 31), (100, 130)])
def test_the_smallest_epsilons_end_near_the_exact_cost(shape: tuple[int, int], epsilon: float) -> None:
    cost = unrelated_cost(*shape)
    plan = sinkhorn(cost, *masses(cost), epsilon)
    exact = float(ot.emd2(*(each.numpy() for each in masses(cost)), cost.numpy()))
    assert math.isfinite(float(plan.sum()))
    assert exact - 1e-9 <= float((plan * cost).sum()) <= exact + 0.01 * float(cost.mean())


def test_an_entropic_barycenter_descends() -> None:
    problem = random_problem((120, 120), dimension=12, dtype=torch.float64)
    found = WassersteinBarycenterSolver(epsilon=0.01).solve(problem)
    trace = found.stats["objective"]
    assert len(trace) > 1
    assert all(later <= earlier for earlier, later in itertools.pairwise(trace))
    assert found.cost >= WassersteinBarycenterSolver().solve(problem).cost - 1e-9
