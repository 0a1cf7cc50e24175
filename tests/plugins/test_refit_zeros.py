"""Laws of what zeros around an image spare: inner products of taps that are outside are not computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mergeot_repair.programs.maps import CONVOLUTION, LINEAR, LinearMap
from mergeot_repair.refit import grams
from mergeot_repair.refit.grams import Gram
from mergeot_repair.refit.samples import inside_of, read_rows
from torch import Tensor
from torch.nn import functional

_CASES = [
    {"kernel": (3, 3), "stride": 1, "padding": 1, "dilation": 1},
    {"kernel": (3, 2), "stride": 2, "padding": (2, 1), "dilation": 1},
    {"kernel": (2, 3), "stride": 1, "padding": 2, "dilation": 2},
    {"kernel": (5, 1), "stride": 1, "padding": (2, 0), "dilation": 1},
]


def _read(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns rows of patches, and which of their taps are inside."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(6, 4, 3, 4, generator=generator) + 1
    weight = torch.randn(5, 4, *case["kernel"], generator=generator)
    arguments = {name: case[name] for name in ("stride", "padding", "dilation")}
    made = functional.conv2d(values, weight, **arguments)
    linear_map = LinearMap(CONVOLUTION, "conv", "values", "weight")
    rows = torch.randperm(made.numel() // 5, generator=generator)[:50]
    read = read_rows(linear_map, weight, arguments, values, rows, made.shape)
    inside = inside_of(linear_map, weight, arguments, values.shape, rows, made.shape)
    assert inside is not None
    return read, inside


@pytest.mark.parametrize("case", _CASES)
def test_taps_outside_read_zeros_and_no_others(case: dict[str, Any]) -> None:
    read, inside = _read(case)
    by_tap = read.reshape(len(read), 4, -1)
    assert torch.equal(by_tap != 0, inside[:, None].expand_as(by_tap))


@pytest.mark.parametrize("case", _CASES)
def test_products_without_zeros_are_all_products(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grams, "_LEAST_CHANNELS", 1)
    monkeypatch.setattr(grams, "_MOST_INSIDE", 1)
    read, inside = _read(case)
    # Of two networks side by side, and with ones behind.
    rows = torch.cat([read, 2 * read, torch.ones(len(read), 1)], 1)
    plain, sparing = Gram(rows.shape[1]), Gram(rows.shape[1])
    for part in (slice(0, 20), slice(20, None)):
        plain.add(rows[part])
        sparing.add(rows[part], inside[part])
    assert not bool(inside.all())
    assert torch.allclose(sparing.whole(), plain.whole(), rtol=1e-5)
    assert torch.equal(sparing.whole(), sparing.whole().T)
    twice = plain.added_to(sparing.whole())
    assert torch.allclose(twice, 2 * plain.whole(), rtol=1e-5)


def test_other_maps_have_no_taps() -> None:
    linear_map = LinearMap(LINEAR, "fc", "values", "weight")
    assert inside_of(linear_map, torch.ones(2, 3), {}, torch.Size([4, 3]), torch.arange(4), torch.Size([4, 2])) is None
