"""Networks whose layers have any scale, dead, equal or single neurons: a network and its reordered copy are one."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Sequence

import pytest
import torch
from _pytest.mark.structures import ParameterSet
from torch import Tensor, nn

from mergekit_ot import DataError, FusionResult, fuse

SOLVERS = ("wb", "otfusion", "gwb", "refinement", "weight-matching", "activation-matching")
SLOW = pytest.mark.slow
INPUTS = torch.randn(48, 5, generator=torch.Generator().manual_seed(1))


def cases(quick: set[tuple[object, ...]], *axes: Sequence[object]) -> list[ParameterSet]:
    """Every combination, those that are not quick in the slow run."""
    return [pytest.param(*each, marks=() if each in quick else SLOW) for each in itertools.product(*axes)]


class Recurrent(nn.Module):
    """A recurrent layer that is read at its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.RNN(5, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x[:, None].repeat(1, 3, 1))[0][:, -1])


@functools.cache
def order_of(size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(size))


def network(size: int = 7, scale: Tensor | float = 1.0) -> nn.Sequential:
    """Two layers; the first times `scale` (of each neuron), the second divided by it: the function stays."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, size), nn.ReLU(), nn.Linear(size, 3)).eval()
    factor = torch.as_tensor(scale).expand(size)
    with torch.no_grad():
        net[0].weight.mul_(factor[:, None])
        net[0].bias.mul_(factor)
        net[2].weight.div_(factor)
    return net


def reordered(net: nn.Sequential) -> nn.Sequential:
    moved = copy.deepcopy(net)
    order = order_of(net[0].out_features)
    with torch.no_grad():
        moved[0].weight.copy_(net[0].weight[order])
        moved[0].bias.copy_(net[0].bias[order])
        moved[2].weight.copy_(net[2].weight[:, order])
    return moved


def fused(net: nn.Sequential, solver: str, **options: object) -> FusionResult:
    sources = [net, reordered(net)]
    return fuse(sources, solver=solver, example_inputs=INPUTS[:2].to(net[0].weight.dtype), data=_data(net), **options)


def _data(net: nn.Sequential) -> list[tuple[Tensor]]:
    return [(INPUTS.to(net[0].weight.dtype),)]


def assert_same(result: FusionResult, net: nn.Module, tolerance: float = 1e-4) -> None:
    assert all(torch.isfinite(tensor).all() for tensor in result.state.values())
    inputs = INPUTS.to(next(net.parameters()).dtype)
    with torch.no_grad():
        ours, theirs = result.model()(inputs).double(), net(inputs).double()
    assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


@pytest.mark.parametrize(
    ("solver", "scale"),
    cases({("gwb", 1e20), ("activation-matching", 1e20), ("wb", 1e-30)}, SOLVERS, (1e20, 1e-20, 1e30, 1e-30)),
)
def test_layers_of_any_scale_are_fused_as_they_are_at_one(solver: str, scale: float) -> None:
    net = network(scale=scale)
    assert_same(fused(net, solver), net)


@pytest.mark.parametrize(
    ("measure", "scale"),
    cases(
        {("weights+activations", 1e20)},
        ("importance", "activations", "correlations", "weights+activations"),
        (1e20, 1e-30),
    ),
)
def test_every_measure_sees_neurons_of_any_scale(measure: str, scale: float) -> None:
    net = network(scale=scale)
    result = fused(net, "wb", measure=measure)
    if measure == "importance":
        # No permutation finds masses that differ; the masses themselves do not depend on the scale.
        plain = fused(network(), "wb", measure=measure)
        plans = [each.alignment.coupling("0.weight:0", 1).transport_plan() for each in (result, plain)]
        torch.testing.assert_close(*plans, atol=1e-4, rtol=0)
    else:
        assert_same(result, net)


@pytest.mark.parametrize("solver", ["wb", pytest.param("otfusion", marks=SLOW)])
def test_every_neuron_may_have_a_scale_of_its_own(solver: str) -> None:
    net = network(scale=torch.tensor([1e20, 1e-20, 1.0, 1e10, 1e-10, 1e19, 1e-19]))
    assert_same(fused(net, solver), net)


@pytest.mark.parametrize(
    ("solver", "kind"), cases({("gwb", "dead"), ("gwb", "single")}, SOLVERS, ("dead", "all dead", "equal", "single"))
)
def test_neurons_that_say_nothing(solver: str, kind: str) -> None:
    net = network(1 if kind == "single" else 6)
    with torch.no_grad():
        for tensor in (net[0].weight, net[0].bias):
            if kind == "equal":
                tensor[:] = tensor[0].clone()
            elif kind != "single":
                tensor[: 6 if kind == "all dead" else 3] = 0
    assert_same(fused(net, solver), net)


@pytest.mark.parametrize(
    ("solver", "dtype"),
    cases({("gwb", torch.float16)}, ("wb", "gwb"), (torch.float16, torch.bfloat16, torch.float64)),
)
def test_types(solver: str, dtype: torch.dtype) -> None:
    net = network().to(dtype)
    result = fused(net, solver)
    assert {tensor.dtype for tensor in result.state.values()} == {dtype}
    assert_same(result, net, 5e-2 if dtype is torch.bfloat16 else 5e-3)


@pytest.mark.parametrize("scale", [1e20, pytest.param(1e-30, marks=SLOW)])
def test_weights_of_zero_and_one_at_any_scale(scale: float) -> None:
    net, other = network(scale=scale), network(scale=1 / scale)
    for weights, expected in (((1.0, 0.0), net), ((0.0, 1.0), other)):
        result = fuse([net, other], model_weights=weights, example_inputs=INPUTS[:2])
        assert_same(result, expected)


@pytest.mark.parametrize("scale", [1e18, pytest.param(1e-18, marks=SLOW)])
def test_recurrent_weights_at_any_scale(scale: float) -> None:
    torch.manual_seed(0)
    net = Recurrent().eval()
    with torch.no_grad():
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            net.recurrent.get_parameter(name).mul_(scale)
    result = fuse([net, copy.deepcopy(net)], solver="gwb", example_inputs=INPUTS[:2])
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(result.state[name], tensor)


def test_responses_too_large_to_be_squared_are_told() -> None:
    net = network().double()
    with torch.no_grad():
        net[0].weight.mul_(1e200)
    with pytest.raises(DataError, match=r"responses of group '0\.weight:0' .* are not finite, or too large"):
        fused(net, "activation-matching")
