"""Laws of the repairs that set moments right: on data (REPAIR) and from the weights alone (rescale)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mergeot_repair.moments import MomentsRepair
from mergeot_repair.rescale import RescaleRepair
from torch import Tensor, nn

from mergekit_ot import AbstractRepair, FusionResult, fuse, resolve_architecture


def _net(seed: int, batch_norm: bool) -> nn.Module:
    torch.manual_seed(seed)
    arguments = {"channels": "6-8", "hidden": 12, "image": 8, "batch_norm": batch_norm}
    net = resolve_architecture("cnn", arguments=arguments)()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return net.eval()


def _repaired(
    nets: list[nn.Module], data: Tensor, repair: AbstractRepair | None = None
) -> tuple[FusionResult, nn.Module]:
    """Returns a fusion and its network after the repair, whatever the comparison on held-out inputs says of it."""
    result = fuse(nets, solver="wb", example_inputs=data[:100], device="cpu")
    context = result.repair_context(result.state, (0.5, 0.5), [(batch,) for batch in data.split(100)])
    return result, result.target.instance((repair or MomentsRepair()).repair(context))


def _outputs(net: nn.Module, name: str, data: Tensor) -> Tensor:
    found: list[Tensor] = []
    handle = net.get_submodule(name).register_forward_hook(lambda _m, _i, output: found.append(output.detach()))
    with torch.no_grad():
        net(data)
    handle.remove()
    return found[0].movedim(1, 0).flatten(1)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("repair", ["repair", "rescale"])
def test_a_network_fused_with_itself_stays(repair: str, batch_norm: bool) -> None:
    net, data = _net(0, batch_norm), torch.randn(400, 1, 8, 8)
    kind = {"repair": MomentsRepair, "rescale": RescaleRepair}[repair]
    fused = _repaired([net, net], data, kind())[1]
    with torch.no_grad():
        assert torch.allclose(fused(data), net(data), atol=1e-4)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_every_hidden_neuron_gets_the_moments_of_the_sources(batch_norm: bool) -> None:
    nets, data = [_net(seed, batch_norm) for seed in (1, 2)], torch.randn(400, 1, 8, 8)
    result, repaired = _repaired(nets, data)
    aligned = [result.target.instance(result.aligned_state(number)) for number in (0, 1)]
    kind = "bn" if batch_norm else "conv"
    moments: tuple[Callable[[Tensor], Tensor], ...] = (lambda v: v.mean(1), lambda v: v.std(1))
    for name in (f"{kind}1", f"{kind}2", "fc1"):
        for moment in moments:
            goal = sum(moment(_outputs(net, name, data)) for net in aligned) / 2
            assert torch.allclose(moment(_outputs(repaired, name, data)), goal, atol=1e-3)  # type: ignore[arg-type]


def test_without_a_bias_the_deviations_are_those_of_the_sources() -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(5, 9, bias=False), nn.ReLU(), nn.Linear(9, 3, bias=False)) for _ in range(2)]
    data = torch.randn(300, 5)
    result, repaired = _repaired(nets, data)
    goal = sum(_outputs(result.target.instance(result.aligned_state(i)), "0", data).std(1) for i in (0, 1)) / 2
    assert torch.allclose(_outputs(repaired, "0", data).std(1), goal, atol=1e-4)  # type: ignore[arg-type]


def test_rescaled_rows_have_the_mean_length_of_the_aligned_rows() -> None:
    nets, data = [_net(seed, batch_norm=False) for seed in (1, 2)], torch.randn(20, 1, 8, 8)
    result = fuse(nets, solver="wb", example_inputs=data, repair="rescale", device="cpu")
    states = [result.aligned_state(number) for number in (0, 1)]
    for name in ("conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"):
        goal = sum(state[name].flatten(1).norm(dim=1) for state in states) / 2
        assert torch.allclose(result.state[name].flatten(1).norm(dim=1), goal, rtol=1e-5)  # type: ignore[arg-type]


def test_results_of_the_model_are_left_alone() -> None:
    nets, data = [_net(seed, batch_norm=False) for seed in (1, 2)], torch.randn(400, 1, 8, 8)
    result, repaired = _repaired(nets, data)
    states = [result.state, repaired.state_dict()]
    assert torch.equal(states[0]["fc2.weight"], states[1]["fc2.weight"])
    assert not torch.equal(states[0]["fc1.weight"], states[1]["fc1.weight"])
