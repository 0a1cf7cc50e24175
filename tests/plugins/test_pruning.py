"""Laws of the choice of neurons: regressions, eliminations, and networks of which the right choice is known."""

from __future__ import annotations

import pytest
import torch
from mergeot_repair.refit.pruning import Products, Regression, eliminate
from mergeot_repair.refit.refit import RefitRepair
from torch import Tensor, nn

from mergekit_ot import fuse, resolve_architecture


def _problem(neurons: int = 6, taps: int = 3, outputs: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    inputs = torch.randn(200, neurons * taps)
    return inputs, inputs @ torch.randn(neurons * taps, outputs) + 0.5 * torch.randn(200, outputs) + 1


def _regression(inputs: Tensor, outputs: Tensor, neurons: int, has_shift: bool) -> Regression:
    products = Products(has_shift)
    for part in (slice(0, 80), slice(80, None)):
        products.add(inputs[part], outputs[part])
    return Regression(products, torch.eye(outputs.shape[1]), torch.arange(neurons))


def _error(inputs: Tensor, outputs: Tensor, has_shift: bool, pull: float) -> tuple[float, Tensor]:
    rows, made = inputs.double(), outputs.double()
    if has_shift:
        rows, made = rows - rows.mean(0), made - made.mean(0)
    weights = torch.linalg.solve(rows.T @ rows + pull * torch.eye(rows.shape[1]), rows.T @ made)
    return float((made - rows @ weights).square().sum() + pull * weights.square().sum()), weights


@pytest.mark.parametrize("has_shift", [False, True])
def test_losses_are_what_a_regression_without_the_neuron_loses(has_shift: bool) -> None:
    inputs, outputs = _problem()
    found = _regression(inputs, outputs, 6, has_shift)
    rows = inputs.double() - (inputs.double().mean(0) if has_shift else 0)
    pull = 1e-3 * float(rows.square().sum(0).mean())
    whole, weights = _error(inputs, outputs, has_shift, pull)
    assert torch.allclose(found.rows(torch.arange(6)), weights.T, atol=1e-5)
    for neuron, loss in enumerate(found.losses().tolist()):
        rest = [column for column in range(18) if column // 3 != neuron]
        less, _ = _error(inputs[:, rest], outputs, has_shift, pull)
        assert loss * found.length**2 == pytest.approx(less - whole, rel=1e-3)


def test_dropping_gives_the_regression_of_the_rest() -> None:
    inputs, outputs = _problem()
    found = _regression(inputs, outputs, 6, has_shift=True)
    assert found.drop(torch.tensor([1, 4]))
    assert not found.drop(torch.tensor([1]))
    pull = 1e-3 * float((inputs.double() - inputs.double().mean(0)).square().sum(0).mean())
    rest = [column for column in range(18) if column // 3 not in (1, 4)]
    _, weights = _error(inputs[:, rest], outputs, True, pull)
    assert torch.allclose(found.rows(torch.tensor([0, 2, 3, 5])), weights.T, atol=1e-5)


def test_the_least_needed_neurons_go_and_sizes_are_kept() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(300, 8)
    outputs = inputs[:, [0, 3, 5]] @ torch.randn(3, 4)
    one = _regression(inputs, outputs, 8, has_shift=False)
    places = {"g": [torch.arange(4), torch.arange(4, 8)]}
    assert eliminate([one], places, {"g": 3})["g"].tolist() == [0, 3, 5]


def test_neurons_that_stand_in_for_each_other_do_not_go_together() -> None:
    torch.manual_seed(0)
    half = torch.randn(300, 40)
    outputs = half @ torch.randn(40, 6)
    one = _regression(torch.cat([half, half], 1), outputs, 80, has_shift=False)
    left = eliminate([one], {"g": [torch.arange(40), torch.arange(40, 80)]}, {"g": 40})["g"]
    assert sorted((left % 40).tolist()) == list(range(40))


def _half_silent(kind: str, is_second: bool) -> nn.Module:
    """A network of which every second neuron of the hidden layers reaches nothing."""
    torch.manual_seed(5 if is_second else 4)
    if kind == "mlp":
        net: nn.Module = resolve_architecture("mlp", arguments={"sizes": "5-8-8-3"})()
        readers = ["fc2", "fc3"]
    else:
        net = resolve_architecture("cnn", arguments={"channels": "6-8", "hidden": 8, "image": 8})()
        readers = ["conv2", "fc1", "fc2"]
    with torch.no_grad():
        for name in readers:
            weight = net.get_submodule(name).weight
            width = {"conv2": 6, "fc1": 8, "fc2": 8, "fc3": 8}[name]
            weight.reshape(len(weight), width, -1)[:, ::2] = 0
    return net.eval()


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_two_networks_that_fit_into_one_become_their_mean(kind: str) -> None:
    nets = [_half_silent(kind, is_second) for is_second in (False, True)]
    shape = (5,) if kind == "mlp" else (1, 8, 8)
    data, held_out = torch.randn(800, *shape), torch.randn(100, *shape)
    fused = fuse(nets, solver="wb", data=[data], calibration_size=800, repair="refit", device="cpu").model()
    with torch.no_grad():
        goal = (nets[0](held_out) + nets[1](held_out)) / 2
        assert float((fused(held_out) - goal).abs().max()) < 2e-3 * float(goal.abs().max())


@pytest.mark.slow
def test_a_residual_network_and_its_stream() -> None:
    nets = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        net = resolve_architecture("resnet20", arguments={"width": 4, "in_channels": 1})()
        net.train()
        with torch.no_grad():
            for _ in range(5):
                net(torch.randn(64, 1, 8, 8))
        nets.append(net.eval())
    data, held_out = torch.randn(600, 1, 8, 8), torch.randn(200, 1, 8, 8)
    with torch.no_grad():
        goal = (nets[0](held_out) + nets[1](held_out)) / 2
        errors = []
        for repair in ("none", "refit"):
            fused = fuse(nets, solver="wb", data=[data], calibration_size=600, repair=repair, device="cpu")
            errors.append(float((fused.model()(held_out) - goal).square().mean()))
        result = fuse([nets[0]] * 2, solver="wb", example_inputs=data[:100], device="cpu")
        context = result.repair_context(result.state, (0.5, 0.5), [(part,) for part in data.split(100)])
        same = result.target.instance(RefitRepair().repair(context))
        own = nets[0](held_out)
        assert float((same(held_out) - own).abs().max()) < 0.02 * float(own.abs().max())
    assert errors[1] < 0.5 * errors[0]


def test_a_model_weight_of_zero_leaves_nothing_of_that_source() -> None:
    torch.manual_seed(0)
    nets = [resolve_architecture("mlp", arguments={"sizes": "5-8-8-3"})().eval() for _ in range(2)]
    data = torch.randn(400, 5)
    fused = fuse(
        nets, solver="wb", data=[data], calibration_size=400, repair="refit", model_weights=(0.0, 1.0), device="cpu"
    )
    with torch.no_grad():
        assert torch.allclose(fused.model()(data), nets[1](data), atol=1e-4)
