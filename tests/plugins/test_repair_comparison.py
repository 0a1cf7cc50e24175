"""A repair is never farther from its sources on held-out inputs than no repair; else it is not in the result."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mergeot_repair.moments import MomentsRepair
from mergeot_repair.refit.refit import RefitRepair
from mergeot_repair.refit.regression import STRENGTHS, Sums
from torch import Tensor, nn

from mergekit_ot import AbstractRepair, DataError, FusionResult, PluginManager, RepairContext, fuse, hookimpl


class Spoiling(AbstractRepair):
    """Sets the last layer to noise, or to NaN."""

    needs_data = False

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def repair(self, context: RepairContext) -> dict[str, Tensor]:
        last = list(context.fused)[-1]
        return {**context.fused, last: self.factor * torch.randn_like(context.fused[last])}


class Keeping(AbstractRepair):
    needs_data = True

    def repair(self, context: RepairContext) -> dict[str, Tensor]:
        return dict(context.fused)


def _net(seed: int, batch_norm: bool = False) -> nn.Module:
    """A network with a rule of its own that it learned in some steps."""
    torch.manual_seed(seed)
    norm = [nn.BatchNorm1d(24)] if batch_norm else []
    net = nn.Sequential(nn.Linear(12, 24), *norm, nn.ReLU(), nn.Linear(24, 4))
    generator = torch.Generator().manual_seed(7)
    rule = torch.randn(12, 4, generator=generator)
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(120):
        inputs = torch.randn(100, 12, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), (inputs @ rule).relu().argmax(1)).backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def nets() -> list[nn.Module]:
    return [_net(0), _net(1)]


@pytest.fixture(scope="module")
def normed() -> list[nn.Module]:
    return [_net(0, batch_norm=True), _net(1, batch_norm=True)]


def _data(count: int, seed: int = 3) -> Tensor:
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(seed))


def _fuse(nets: list[nn.Module], data: Tensor, repair: str, manager: PluginManager | None = None) -> FusionResult:
    return fuse(nets, solver="wb", data=[data], repair=repair, device="cpu", manager=manager)


def _error(nets: list[nn.Module], net: nn.Module) -> float:
    held_out = _data(1000, seed=11)
    with torch.no_grad():
        goal = (nets[0](held_out) + nets[1](held_out)) / 2
        return float((net(held_out) - goal).square().mean())


def _with(**repairs: type[AbstractRepair]) -> PluginManager:
    manager = PluginManager.load()
    manager.register(SimpleNamespace(mergeot_repairs=hookimpl(lambda: repairs)), "mine")
    return manager


def test_a_repair_that_is_farther_than_none_is_not_in_the_result(nets: list[nn.Module]) -> None:
    result = _fuse(nets, _data(300), "spoiling", _with(spoiling=Spoiling))
    plain = fuse(nets, solver="wb", example_inputs=_data(2), device="cpu").state
    assert all(torch.equal(result.state[name], value) for name, value in plain.items())
    found = result.repair_comparison
    assert found is not None
    assert not found.is_written
    assert found.repaired.plain > found.unrepaired.plain
    (warning,) = (text for text in result.warnings if "NOT in the result" in text)
    assert "'spoiling'" in warning
    assert found.sentence in warning


def test_a_repair_that_changes_nothing_is_no_farther(nets: list[nn.Module]) -> None:
    result = _fuse(nets, _data(300), "keeping", _with(keeping=Keeping))
    assert result.repair_comparison is not None
    assert result.repair_comparison.is_written


def test_a_good_repair_is_in_the_result_and_told_with_its_numbers(nets: list[nn.Module]) -> None:
    result = _fuse(nets, _data(600), "refit")
    found = result.repair_comparison
    assert found is not None
    assert found.is_written
    assert found.repaired.is_no_farther(found.unrepaired)
    assert len(found.sources) == 2
    assert f"on {found.held_out:,} held-out" in found.sentence
    assert not any("NOT in the result" in text for text in result.warnings)
    plain = fuse(nets, solver="wb", example_inputs=_data(2), device="cpu")
    assert _error(nets, result.model()) < 0.7 * _error(nets, plain.model())


@pytest.mark.parametrize("count", [4, 10, 16])
def test_few_samples_make_no_network_worse(nets: list[nn.Module], count: int) -> None:
    """The maps have 12 and 24 inputs: with so few samples a fit alone makes the network worse."""
    result = _fuse(nets, _data(count), "refit")
    plain = fuse(nets, solver="wb", example_inputs=_data(2), device="cpu")
    assert _error(nets, result.model()) <= _error(nets, plain.model())


@pytest.mark.parametrize("weights", [None, (0.3, 0.7)])
def test_a_network_with_itself_stays_and_duplicates_among_the_candidates_too(
    nets: list[nn.Module], weights: tuple[float, ...] | None
) -> None:
    """The copies have other orders, so that each neuron stands twice among the candidates, in two places."""
    net = nets[0]
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    copy = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 4))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    state["0.weight"], state["0.bias"], state["2.weight"] = (
        state["0.weight"][order],
        state["0.bias"][order],
        state["2.weight"][:, order],
    )
    copy.load_state_dict(state)
    data = _data(600)
    result = fuse([net, copy.eval()], solver="wb", data=[data], repair="refit", model_weights=weights, device="cpu")
    with torch.no_grad():
        own = net(data)
        assert float((result.model()(data) - own).abs().max()) < 1e-5 * float(own.abs().max())
        context = result.repair_context(result.state, weights or (0.5, 0.5), [(part,) for part in data.split(100)])
        alone = result.target.instance(RefitRepair().repair(context))
        assert float((alone(data) - own).abs().max()) < 1e-2 * float(own.abs().max())


@pytest.mark.parametrize("repair", ["reset", "repair", "refit"])
@pytest.mark.parametrize("shift", [3.0, 27.0])
def test_data_that_the_sources_statistics_do_not_know_are_refused(
    normed: list[nn.Module], repair: str, shift: float
) -> None:
    with pytest.raises(DataError, match="do not look like what the sources were trained on"):
        _fuse(normed, _data(300) + shift, repair)


@pytest.mark.parametrize("repair", ["reset", "repair", "refit"])
def test_data_that_they_know_are_not(normed: list[nn.Module], repair: str) -> None:
    assert _fuse(normed, _data(300), repair).repair_comparison is not None


def test_data_of_one_class_are_told(nets: list[nn.Module]) -> None:
    data = _data(3000)
    with torch.no_grad():
        ensemble = (nets[0](data) + nets[1](data)) / 2
    result = _fuse(nets, data[ensemble.argmax(1) == 1][:500], "refit")
    assert any("the same class" in text for text in result.warnings)


def test_the_pull_of_a_regression_is_found_by_cross_validation() -> None:
    """Targets that the start explains up to noise ask for much of it, exact ones for little."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 30, generator=generator)
    strengths = {}
    for noise in (0.0, 5.0):
        sums = Sums(30, 3)
        for _ in range(4):
            inputs = torch.randn(12, 30, generator=generator)
            true = start if noise else start + 1
            sums.add(inputs, inputs @ true.T + noise * torch.randn(12, 3, generator=generator))
        strengths[noise] = sums.solve(start, has_shift=False).strength
    assert strengths[0.0] == STRENGTHS[0]
    assert strengths[5.0] == STRENGTHS[-1]


def test_a_silent_neuron_is_not_blown_up() -> None:
    """The first neurons of the two networks are nearly opposite: their mean is all but silent, neither of them is."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2)]
    with torch.no_grad():
        nets[1][0].weight[:2] = -nets[0][0].weight[:2]
        nets[1][0].weight[1] *= 1 - 1e-5
    data = torch.randn(300, 5)
    result = fuse(nets, solver="average", example_inputs=data[:100], device="cpu")
    context = result.repair_context(result.state, (0.5, 0.5), [(part,) for part in data.split(100)])
    repaired = MomentsRepair().repair(context)["0.weight"]
    assert torch.allclose(repaired[:2], result.state["0.weight"][:2], atol=1e-6)
    assert not torch.allclose(repaired[2:], result.state["0.weight"][2:], atol=1e-3)
