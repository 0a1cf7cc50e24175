"""Laws of the repairs on convolutions of all kinds: strided, dilated, padded to the same size, grouped, transposed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergeot_repair.programs.maps import MapFinder
from mergeot_repair.programs.running import HeldBytes, StagedRun
from mergeot_repair.refit.refit import RefitRepair
from mergeot_repair.refit.samples import read_rows, regression_rows, rows_of, weight_of
from nets import draw_norms
from torch import Tensor, nn

from mergekit_ot import fuse, named_arguments, trace_model
from mergekit_ot.fusion.calibration import calibration_batches

_PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@st.composite
def _convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    axes, kernel, dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2)))
    stride, padding = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    image = torch.randn(3, 4, *[draw(st.integers(6, 8)) for _ in range(axes)])
    if draw(st.booleans()):
        more = draw(st.integers(0, max(stride, dilation) - 1))
        return _TRANSPOSED[axes](4, 6, kernel, stride, padding, more, dilation=dilation), image
    groups = draw(st.sampled_from([1, 2, 4]))
    if stride == 1 and draw(st.booleans()):
        return _PLAIN[axes](4, 8, kernel, padding=draw(st.sampled_from(["same", "valid"])), groups=groups), image
    return _PLAIN[axes](4, 8, kernel, stride, padding, dilation, groups), image


@settings(max_examples=20, deadline=None)
@given(_convolutions())
def test_rows_of_a_regression_compute_what_the_convolution_does(case: tuple[nn.Module, Tensor]) -> None:
    module, image = case
    program = trace_model(nn.Sequential(module, nn.ReLU()).eval(), (image,)).program
    (one,) = MapFinder(program).find()
    state = {f"0.{name}": value.detach() for name, value in module.named_parameters()}
    values = StagedRun(program, state, [image], HeldBytes()).values_of([one.source, one.output])
    weight, arguments = state[one.weight], named_arguments({n.name: n for n in program.graph.nodes}[one.node])
    read, made = regression_rows(one, weight, arguments, values[one.source], values[one.output])
    rows = rows_of(one, weight)
    found = [part @ own.T for part, own in zip(read.chunk(one.groups, 1), rows.chunk(one.groups), strict=True)]
    assert torch.allclose(torch.cat(found, 1) + state["0.bias"], made, atol=1e-4)
    assert torch.equal(weight_of(one, rows, weight), weight)
    # A few places, which are read in another way than all of them.
    few = torch.tensor([len(made) - 1, 0])
    assert torch.equal(read_rows(one, weight, arguments, values[one.source], few, values[one.output].shape), read[few])


class _Mobile(nn.Module):
    """A depthwise and a pointwise convolution, one that pads to the same size, and a transposed one."""

    def __init__(self, batch_norm: bool) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if batch_norm else (lambda _: nn.Identity())
        self.body = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding="same"),
            norm(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            norm(8),
            nn.ReLU(),
            nn.Conv2d(8, 6, 1),
            norm(6),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 5, 3, 2, 1, 1),
            norm(5),
            nn.ReLU(),
            nn.Conv2d(5, 3, 3, 2),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images).mean((2, 3))


def _net(seed: int, batch_norm: bool) -> nn.Module:
    torch.manual_seed(seed)
    net = _Mobile(batch_norm)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight)
    draw_norms(net)
    return net.eval()


def _data() -> Tensor:
    return torch.randn(300, 2, 6, 6, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("repair", ["refit", "repair", "rescale"])
def test_a_network_fused_with_itself_stays(repair: str, batch_norm: bool) -> None:
    net, data = _net(0, batch_norm), _data()
    fused = fuse([net, net], solver="wb", data=[data], calibration_size=300, repair=repair, device="cpu").model()
    with torch.no_grad():
        assert torch.allclose(fused(data), net(data), atol=1e-3)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_refit_comes_nearer_to_the_mean_of_the_sources(batch_norm: bool) -> None:
    nets, data = [_net(seed, batch_norm) for seed in (1, 2)], _data()
    errors = []
    for repair in ("none", "refit"):
        fused = fuse(nets, solver="wb", data=[data], calibration_size=300, repair=repair, device="cpu").model()
        with torch.no_grad():
            goal = (nets[0](data) + nets[1](data)) / 2
            errors.append(float((fused(data) - goal).square().mean()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("kind", ["depthwise", "transposed"])
def test_refit_recovers_a_spoiled_convolution(kind: str) -> None:
    """One convolution of a network fused with itself is spoiled; what it made is made again."""
    net, data = _net(0, batch_norm=False), _data()
    name = "body.3.weight" if kind == "depthwise" else "body.9.weight"
    result = fuse([net, net], solver="wb", example_inputs=data, device="cpu")
    damaged = {**result.state, name: torch.randn_like(result.state[name])}
    context = result.repair_context(damaged, (0.5, 0.5), list(calibration_batches([data], 300, 100)))
    with torch.no_grad():
        goal = net(data)
        errors = [
            float((context.instance(state)(data) - goal).square().mean() / goal.var(0).mean())
            for state in (damaged, RefitRepair().repair(context))
        ]
    assert errors[0] > 0.1
    assert errors[1] < 1e-2
