"""One source alone is the result where it is surely nearer to the ensemble of all than the fused network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mergekit_ot import AbstractBarycenterSolver, BarycenterProblem, DataError, FusionResult, Permutation, fuse


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


def test_a_fusion_without_a_repair_is_judged_as_well() -> None:
    nets = [_net(seed) for seed in (0, 1, 2)]
    for solver in ("average", "wb", "activation-matching"):
        result = fuse(nets, data=_data(), solver=solver, model_weights=(0.1, 0.8, 0.1), device="cpu")
        assert result.repair_comparison.repair == "none"
        is_named = any("Source number 2 alone is nearer" in warning for warning in result.warnings)
        assert is_named == (result.repair_comparison.nearer_source == 1)
        assert is_named or solver != "average"


def test_judging_changes_nothing_of_what_is_fused() -> None:
    nets, inputs = [_net(0), _net(1)], _data()[0]
    plain = fuse(nets, example_inputs=inputs[:2], solver="wb", device="cpu")
    judged = fuse(nets, data=[inputs], solver="wb", device="cpu")
    assert plain.repair_comparison is None
    assert all(torch.equal(judged.state[name], value) for name, value in plain.state.items())


class Rolled(AbstractBarycenterSolver):
    """Takes every neuron of the second source for its neighbour's."""

    name = "rolled"
    summary = "every neuron of the second source for its neighbour's"

    def find(self, problem: BarycenterProblem) -> tuple[Permutation, ...]:
        order = torch.arange(problem.size)
        return Permutation(order), Permutation(order.roll(1))


def test_the_plain_mean_is_named_where_it_is_nearer() -> None:
    """Two networks of one training, their neurons in one order, which a solver breaks."""
    first = _net(0)
    second = copy.deepcopy(first)
    with torch.no_grad():
        second[0].weight.add_(0.01)
    broken = fuse([first, second], data=_data(), solver=Rolled(), device="cpu")
    assert broken.repair_comparison.mean.plain < 1e-3 < broken.repair_comparison.unrepaired.plain
    assert any("The plain mean of the sources' weights is nearer" in warning for warning in broken.warnings)
    whole = fuse([first, second], data=_data(), solver="wb", device="cpu")
    assert not any("plain mean" in warning for warning in whole.warnings)
    assert fuse([first, _net(1, 12)], data=_data(), solver="wb", device="cpu").repair_comparison.mean is None


def test_data_that_nothing_can_be_told_from_cost_no_fusion() -> None:
    spoilt = [_data(4)[0], torch.full((4, 6), torch.nan)]
    result = fuse([_net(0), _net(1)], data=spoilt, solver="wb", device="cpu")
    assert result.repair_comparison is None
    assert any("is not compared with its sources on the data" in note for note in result.notes)
