"""Calibration data: what is refused, what is fitted to, and what is held out."""

from __future__ import annotations

import pytest
import torch
from nets import Mlp
from torch import Tensor

from mergekit_ot import DataError, fuse
from mergekit_ot.fusion.calibration import calibration_inputs, split_calibration


def _data(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def _rows(batches: tuple[tuple[Tensor, ...], ...]) -> set[tuple[float, ...]]:
    return {tuple(row) for (inputs,) in batches for row in inputs.tolist()}


@pytest.mark.parametrize(
    ("count", "size", "fitted", "held_out"),
    [(4, 2000, 2, 2), (10, 2000, 5, 5), (50, 2000, 30, 20), (1000, 1000, 800, 200), (3000, 2000, 2000, 200)],
)
def test_nothing_is_fitted_to_what_is_held_out(count: int, size: int, fitted: int, held_out: int) -> None:
    data = list(_data(count).split(64))
    found = split_calibration(data, size)
    to_fit, to_judge = _rows(found.batches), _rows(found.held_out)
    assert not to_fit & to_judge
    batch = len(found.batches[0][0])
    assert fitted - batch < len(to_fit) <= fitted
    assert held_out - batch < len(to_judge) <= held_out
    again = split_calibration(data, size)
    assert all(torch.equal(one, other) for (one,), (other,) in zip(found.batches, again.batches, strict=True))


def test_what_is_beyond_the_calibration_size_is_held_out_first() -> None:
    data = _data(700)
    found = split_calibration([data], 400)
    assert torch.equal(torch.cat([inputs for (inputs,) in found.batches]), data[:400])
    assert _rows(found.held_out) <= {tuple(row) for row in data[400:].tolist()}


def test_copies_count_once() -> None:
    data = _data(60)
    found = split_calibration([data.repeat(5, 1)], 2000)
    assert not _rows(found.batches) & _rows(found.held_out)
    assert sum(len(inputs) for (inputs,) in (*found.batches, *found.held_out)) <= 60
    assert "240 repeat others" in found.notes[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("options", [{"repair": "refit"}, {"repair": "reset"}, {"solver": "activation-matching"}])
def test_a_number_that_is_not_finite_is_named(value: float, options: dict[str, str]) -> None:
    data = _data(300)
    data[299, 4] = value
    with pytest.raises(DataError, match=r"Sample 299 of the calibration data \(batch 4, place 43.*1 of 6 numbers"):
        fuse([Mlp(), Mlp()], data=list(data.split(64)), device="cpu", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1e3, -1e6, 1e20, 1e38])
def test_an_outlier_is_named(value: float) -> None:
    data = _data(300)
    data[17, 2] = value
    for read in (calibration_inputs, split_calibration):
        with pytest.raises(DataError, match=r"Sample 17 of the calibration data.*outlier.*outliers in all: 1\."):
            read(list(data.split(64)), 2000)


@pytest.mark.parametrize("kind", ["normal", "heavy", "binary", "sparse", "tokens", "moved"])
def test_what_data_may_be_like_is_no_outlier(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(500, 20, generator=generator)
    data = {
        "normal": normal,
        "heavy": normal.exp(),
        "binary": (normal > 2).float(),
        "sparse": normal * (torch.rand(500, 1, generator=generator) < 0.05),
        "tokens": (normal.abs() * 1000).long(),
        "moved": normal + 1e4,
    }[kind]
    assert calibration_inputs([data], 2000)


@pytest.mark.parametrize("data", [torch.ones(500, 6), _data(1).repeat(500, 1)])
def test_one_sample_many_times_is_refused(data: Tensor) -> None:
    for read in (calibration_inputs, split_calibration):
        with pytest.raises(DataError, match="one sample, 500 times"):
            read([data], 2000)


@pytest.mark.parametrize(("count", "size"), [(0, 2000), (1, 2000), (3, 2000), (500, 3)])
def test_too_few_samples_are_refused(count: int, size: int) -> None:
    with pytest.raises(DataError, match="at least 4 different ones"):
        split_calibration([_data(count)], size)


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([torch.randn(4, 6), torch.randn(4, 5)], "Batch 1 of the calibration data.* one shape"),
        ([((torch.randn(4, 6), torch.randn(3, 6)), None)], "Batch 0 of the calibration data.* as many as the others"),
    ],
)
def test_batches_that_do_not_fit_together_are_named(batches: list[object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        split_calibration(batches, 2000)
