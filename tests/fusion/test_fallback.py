"""One source alone is the result where it is surely nearer to the ensemble of all than the fused network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mergekit_ot import DataError, FusionResult, fuse


def _net(seed: int, width: int = 8, factor: float = 3.0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 4)).eval()
    with torch.no_grad():
        net[2].weight.mul_(factor)
    return net


def _data(count: int = 300) -> list[Tensor]:
    return [torch.randn(count, 6, generator=torch.Generator().manual_seed(5))]


def _fused(nets: list[nn.Module], **options: object) -> FusionResult:
    return fuse(nets, data=_data(), device="cpu", fallback=True, **options)


def test_the_nearest_source_is_written_as_it_is() -> None:
    nets = [_net(seed) for seed in (0, 1, 2)]
    result = _fused(nets, solver="average", model_weights=(0.1, 0.8, 0.1))
    assert result.alone == 1
    assert all(torch.equal(result.state[name], value) for name, value in nets[1].state_dict().items())
    assert "Source number 2 alone is written, as it is (--fallback)." in result.notes
    assert any("Source number 2 alone is nearer to the ensemble" in warning for warning in result.warnings)


def test_a_fused_network_that_is_the_ensemble_stays() -> None:
    net = _net(0)
    result = _fused([net, copy.deepcopy(net)], solver="wb")
    assert result.alone is None
    plain = fuse([net, copy.deepcopy(net)], data=_data(), solver="wb", device="cpu")
    assert all(torch.equal(result.state[name], value) for name, value in plain.state.items())
    assert (
        "The fused network is written: no source alone is surely nearer to the ensemble (--fallback)." in result.notes
    )


def test_a_source_of_other_sizes_cannot_stand_in() -> None:
    result = _fused([_net(0, 8), _net(1, 12, factor=30.0)], solver="wb", model_weights=(0.05, 0.95))
    assert result.repair_comparison.nearer_source == 1
    assert result.alone is None
    assert result.state["0.weight"].shape == (8, 6)
    assert any("source number 2 has other sizes" in note for note in result.notes)


def test_without_fallback_the_source_is_only_named() -> None:
    nets, weights = [_net(seed) for seed in (0, 1, 2)], (0.1, 0.8, 0.1)
    result = fuse(nets, data=_data(), solver="average", repair="rescale", model_weights=weights, device="cpu")
    assert result.alone is None
    assert result.repair_comparison.nearer_source == 1
    assert any("it may be the better network" in warning for warning in result.warnings)


def test_few_or_doubtful_differences_name_no_source() -> None:
    """Two sources beside their exact mean: which one is nearer is chance."""
    first = nn.Linear(6, 4)
    second = nn.Linear(6, 4)
    result = fuse([first, second], data=_data(), solver="average", repair="rescale", device="cpu")
    assert result.repair_comparison.nearer_source is None


def test_the_choice_needs_data() -> None:
    with pytest.raises(
        DataError, match=r"choice between the fused model and a source \(--fallback\) needs calibration"
    ):
        fuse([_net(0), _net(1)], example_inputs=torch.randn(2, 6), fallback=True)
