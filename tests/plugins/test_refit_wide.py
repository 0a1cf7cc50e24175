"""Laws of maps with more inputs than samples, and of those whose Gram matrix is too large."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mergeot_repair.refit import regression, wide
from mergeot_repair.refit.refit import RefitRepair
from mergeot_repair.refit.regression import STRENGTHS, Sums
from mergeot_repair.refit.wide import KeptSamples
from torch import Tensor, nn

from mergekit_ot import FusionResult, fuse


def _batches(inputs: int, outputs: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    read = torch.randn(96, inputs, generator=generator, dtype=torch.float64) + 2
    made = torch.randn(96, outputs, generator=generator, dtype=torch.float64)
    made = 4 * made + read @ torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)
    return list(zip(read.split(8), made.split(8), strict=True))


@pytest.mark.parametrize("strength", [None, STRENGTHS[0], STRENGTHS[4]])
@pytest.mark.parametrize("has_shift", [False, True])
def test_kept_samples_give_what_a_gram_matrix_gives(
    has_shift: bool, strength: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regression, "_FEW_INPUTS", 0)
    one, other = Sums(120, 5), KeptSamples()
    start = torch.randn(5, 120, generator=torch.Generator().manual_seed(4))
    for read, made in _batches(120, 5):
        one.add(read, made)
        before = read.clone()
        other.add(read, made)
    expected, found = one.solve(start, has_shift, strength), other.solve(start, has_shift, strength)
    assert torch.equal(read, before)
    assert found.strength == expected.strength
    for value, wanted in (
        (found.weight, expected.weight),
        (found.shift, expected.shift),
        (found.mean, expected.mean),
        (found.variance, expected.variance),
    ):
        assert torch.allclose(value, wanted, rtol=1e-8, atol=1e-8 * float(wanted.abs().max()))


def _hidden(width: int) -> list[nn.Module]:
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        nets.append(nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)))
    return nets


def _repaired(result: FusionResult, data: Tensor, told: list[str]) -> dict[str, Tensor]:
    context = result.repair_context(result.state, (0.5, 0.5), [(part,) for part in data.split(50)])
    return RefitRepair().repair(replace(context, note=told.append))


def test_a_map_that_is_too_wide_is_fitted_to_kept_samples_and_the_user_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = torch.randn(400, 6, generator=torch.Generator().manual_seed(5))
    nets = _hidden(40)
    goal = (nets[0](data) + nets[1](data)).detach() / 2
    told: list[str] = []
    errors = []
    for most in (10_000, 30):
        monkeypatch.setattr(wide, "MOST_INPUTS", most)
        monkeypatch.setattr(wide, "MOST_INPUTS_OF_A_CHOICE", most)
        told.clear()
        result = fuse(nets, solver="weight-matching", example_inputs=data[:50], device="cpu")
        fused = result.target.instance(_repaired(result, data, told))
        errors.append(float((fused(data) - goal).detach().square().mean()))
    assert [sentence for sentence in told if "2.weight" in sentence and "30 at most" in sentence and "80" in sentence]
    assert not [sentence for sentence in told if "took over" in sentence]
    before = float((result.target.instance(result.state)(data) - goal).detach().square().mean())
    assert errors[1] < 0.5 * before


def test_maps_of_few_inputs_are_told_of_nothing() -> None:
    data = torch.randn(200, 6, generator=torch.Generator().manual_seed(5))
    told: list[str] = []
    result = fuse(_hidden(8), solver="average", example_inputs=data[:50], device="cpu")
    _repaired(result, data, told)
    assert not [sentence for sentence in told if "chooses no neurons" in sentence]


@pytest.mark.parametrize("inputs", [11_001, 36_864, 400_000])
def test_kept_samples_have_a_bound(inputs: int) -> None:
    most = wide.most_samples(inputs)
    assert most is not None
    assert 1 <= most <= 4_000
    assert 4 * most * inputs <= 600_000_000
    assert isinstance(wide.sums_for(inputs, 5, most), KeptSamples)
