"""Modules that cannot be copied as they are: computed weights, locks, shapes that only an input tells."""

from __future__ import annotations

import re
import threading
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm, weight_norm

from mergekit_ot import ArchitectureError, SourceModel, check_model, fuse, trace_model


def normed(layer: nn.Module, name: str = "weight") -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old form is what is tried
        return weight_norm(layer, name)


class Wave(nn.Module):
    """Gated dilated convolutions with the old weight norm, as vocoders have them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 8, 1)
        self.dilated = nn.ModuleList(normed(nn.Conv1d(8, 16, 3, dilation=d, padding=d)) for d in (1, 2))
        self.joined = nn.ModuleList(normed(nn.Conv1d(8, 8, 1)) for _ in range(2))
        self.last = normed(nn.Conv1d(8, 1, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        stream = self.first(inputs)
        for dilated, joined in zip(self.dilated, self.joined, strict=True):
            value, gate = dilated(stream).chunk(2, 1)
            stream = stream + joined(torch.tanh(value) * torch.sigmoid(gate))
        return self.last(stream)


def test_old_weight_norm_is_traced_and_fused() -> None:
    inputs = torch.randn(2, 1, 12)
    result = fuse([Wave(), Wave()], example_inputs=inputs)
    assert len(result.groups) == 3
    assert not result.warnings
    assert result.aligned_sources_max_error is not None
    assert result.aligned_sources_max_error < 1e-5


@pytest.mark.slow
def test_old_weight_norm_is_certified() -> None:
    report = check_model(Wave, torch.randn(2, 1, 12), trials=1)
    assert (report.groups, report.certified, report.preserved) == (3, 3, True)
    assert not report.warnings


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = normed(nn.LSTM(3, 5, batch_first=True), "weight_hh_l0")
        self.last = nn.Linear(5, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.cells(inputs)[0])


@pytest.mark.parametrize(
    ("make", "shape"),
    [(Recurrent, (2, 4, 3)), (lambda: nn.Sequential(spectral_norm(nn.Linear(3, 6)), nn.Linear(6, 2)), (2, 3))],
)
def test_weights_that_a_hook_computes_are_no_stale_tensors(make, shape) -> None:
    result = fuse([make(), make()], example_inputs=torch.randn(*shape))
    assert len(result.groups) == 1
    assert not result.warnings
    assert result.aligned_sources_max_error is not None
    assert result.aligned_sources_max_error < 1e-5


class Holding(nn.Module):
    """Holds what no copy is made of, and a tensor that was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.lock, self.numbers = threading.Lock(), iter([1, 2])
        self.cache = {"doubled": self.first.weight * 2}

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(inputs)))


def test_what_cannot_be_copied_is_shared_and_computed_tensors_are_copied_by_value() -> None:
    result = fuse([Holding(), Holding()], example_inputs=torch.randn(2, 4))
    assert len(result.groups) == 1
    assert result.aligned_sources_max_error is not None
    assert result.aligned_sources_max_error < 1e-5


def test_a_module_that_refuses_copies_is_told_as_that() -> None:
    class Alone(nn.Linear):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise RuntimeError("there is one of me")

    with pytest.raises(ArchitectureError, match=r"'Alone' cannot be copied \(RuntimeError: there is one of me\)"):
        trace_model(Alone(2, 2), torch.randn(2, 2))


def lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(2))


def test_lazy_modules_take_their_shapes_from_the_inputs() -> None:
    inputs = torch.randn(2, 4)
    made = [lazy(), lazy()]
    for net in made:
        net(inputs)
    sources = [SourceModel(str(number), lazy, net.state_dict()) for number, net in enumerate(made)]
    result = fuse(sources, example_inputs=inputs)
    assert len(result.groups) == 2
    assert result.aligned_sources_max_error is not None
    assert result.aligned_sources_max_error < 1e-5
    fresh = lazy()
    assert len(trace_model(fresh, inputs).free_groups) == 2
    assert isinstance(fresh[2], nn.LazyLinear)


@pytest.mark.slow
def test_lazy_modules_are_certified() -> None:
    assert check_model(lazy, torch.randn(2, 4), trials=1).certified == 2


def test_a_lazy_module_without_weights_is_no_source() -> None:
    with pytest.raises(ArchitectureError, match=re.escape("'2.weight' of source 0 has no shape yet")):
        fuse([lazy(), lazy()], example_inputs=torch.randn(2, 4))


@pytest.mark.parametrize(
    ("make", "inputs", "advice"),
    [
        (lambda: nn.Bilinear(2, 3, 4), (torch.randn(2, 2),), "Give as many inputs as forward takes"),
        (
            lambda: nn.Linear(4, 2),
            (torch.randn(2, 5),),
            r"Check the input shape \(--input-shape, or example_inputs\)\.$",
        ),
    ],
)
def test_a_module_that_cannot_be_traced_is_advised_by_the_cause(make, inputs, advice: str) -> None:
    with pytest.raises(ArchitectureError, match=advice):
        trace_model(make(), inputs)


def test_statistics_that_are_not_kept_are_not_warned_of() -> None:
    make = lambda: nn.Sequential(nn.Conv1d(2, 6, 1), nn.BatchNorm1d(6, track_running_stats=False), nn.Conv1d(6, 2, 1))  # noqa: E731
    result = fuse([make(), make()], example_inputs=torch.randn(2, 2, 5))
    assert len(result.groups) == 1
    assert not result.warnings
