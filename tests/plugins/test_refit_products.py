"""Laws of what makes refit fast: blocks of products, changes that wait, folds held out, places that are read."""

from __future__ import annotations

import pytest
import torch
from mergeot_repair.refit import pruning, regression
from mergeot_repair.refit.grams import Gram, centred, positive_definite
from mergeot_repair.refit.pruning import Products, Regression
from mergeot_repair.refit.regression import STRENGTHS, Sums
from torch import Tensor


def _samples(count: int, inputs: int, outputs: int, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    read = torch.randn(count, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator) + 1
    weights = torch.randn(inputs, outputs, generator=generator)
    return read, read @ weights + noise * torch.randn(count, outputs, generator=generator)


def test_upper_blocks_are_the_whole_matrix() -> None:
    rows, _ = _samples(50, 600, 1)
    total = Gram(600)
    for part in rows.split(20):
        total.add(part)
    assert torch.equal(total.whole(), total.whole().T)
    assert torch.allclose(total.whole(), (rows.T @ rows).double(), rtol=1e-4, atol=1e-1)


def test_means_are_taken_from_products_that_are_others() -> None:
    read, made = (part.double() for part in _samples(40, 5, 3))
    means = read[:10].mean(0), made[:10].mean(0)
    found = centred(read.T @ made, (read.sum(0), made.sum(0)), means, len(read))
    assert torch.allclose(found, (read - means[0]).T @ (made - means[1]))


def test_what_rounding_took_from_a_diagonal_is_given_back() -> None:
    read, _ = _samples(300, 20, 1)
    exact = (read.T @ read).double()
    assert positive_definite(exact) is exact
    # All inputs are nearly alike, and the smallest eigenvalue was rounded below zero.
    rounded = torch.ones(20, 20, dtype=torch.float64) + torch.diag(torch.linspace(-1e-4, 1e-4, 20))
    mended = positive_definite(rounded)
    assert int(torch.linalg.cholesky_ex(mended).info) == 0
    assert float((mended - rounded).abs().max()) <= 2e-3


@pytest.mark.parametrize("together", [6, 1000])
def test_changes_of_the_inverse_may_wait(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "_TOGETHER", together)
    read, made = _samples(400, 60, 4)
    products = Products(has_shift=True)
    products.add(read, made)
    one = Regression(products, torch.eye(4), torch.arange(20))
    for dropped in ([3], [7, 8], [0, 1, 2, 4, 5], [19], [12], [13]):
        one.drop(torch.tensor(dropped))
    left = torch.tensor([6, 9, 10, 11, 14, 15, 16, 17, 18])
    columns = (left[:, None] * 3 + torch.arange(3)).flatten()
    gram, cross, length = products.towards(torch.eye(4))
    rest = gram[columns][:, columns]
    weights = torch.linalg.solve(rest, cross[columns])
    assert torch.allclose(one.rows(left), weights.T, rtol=1e-8, atol=1e-8)
    inverse, blocks = torch.linalg.inv(rest), weights.reshape(9, 3, 4) / length
    own = torch.stack([inverse[3 * n : 3 * n + 3, 3 * n : 3 * n + 3] for n in range(9)])
    expected = (blocks * torch.linalg.solve(own, blocks)).sum((1, 2))
    losses = dict(zip(one.neurons.tolist(), one.losses().tolist(), strict=True))
    assert [losses[int(neuron)] for neuron in left] == pytest.approx(expected.tolist(), rel=1e-6)


def test_what_a_map_reads_may_be_silent() -> None:
    products = Products(has_shift=True)
    products.add(torch.zeros(50, 6), torch.zeros(50, 2))
    one = Regression(products, torch.eye(2), torch.arange(6))
    assert one.drop(torch.tensor([1, 4]))
    assert bool(one.losses().isfinite().all())
    assert not bool(one.rows(torch.tensor([0, 2, 3, 5])).any())


@pytest.mark.parametrize("few", [0, 1000])
@pytest.mark.parametrize("has_shift", [False, True])
@pytest.mark.parametrize("noise", [0.0, 3.0, 300.0])
def test_the_strength_is_the_one_that_fits_what_was_held_out(
    noise: float, has_shift: bool, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regression, "_FEW_INPUTS", few)
    read, made = _samples(240, 40, 3, noise)
    sums, batches = Sums(40, 3), list(zip(read.split(30), made.split(30), strict=True))
    for batch in batches:
        sums.add(*batch)
    start = torch.zeros(3, 40)
    errors = dict.fromkeys(STRENGTHS, 0.0)
    for fold in range(4 if few else 1):
        fitted = [batch for number, batch in enumerate(batches) if number % 4 != fold]
        x, y = (torch.cat(parts).double() for parts in zip(*fitted, strict=True))
        held, goals = (torch.cat(parts).double() for parts in zip(*batches[fold::4], strict=True))
        if has_shift:
            held, goals = held - x.mean(0), goals - y.mean(0)
            x, y = x - x.mean(0), y - y.mean(0)
        for strength in STRENGTHS:
            pull = strength * x.square().sum(0).mean() * torch.eye(40)
            weights = torch.linalg.solve(x.T @ x + pull, x.T @ y)
            errors[strength] += float((goals - held @ weights).square().sum())
    assert sums.solve(start, has_shift).strength == min(STRENGTHS, key=errors.__getitem__)
