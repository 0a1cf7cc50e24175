"""What families of neurons cost: a residual network with normalised groups of channels beside the plain one.

Run with ``pytest tests/benchmarks/test_families.py --benchmark-enable --benchmark-only -s``: a ratio for each, CPU time
of one thread, in turn, median of five.
"""

from __future__ import annotations

import pytest
import torch
from contests import medians
from torch import Tensor, nn

from mergekit_ot import FusionInputs, FusionOptions, trace_model
from mergekit_ot.fusion.engine import FusionRun
from mergekit_ot.hooks.manager import default_manager
from mergekit_ot.hooks.preparing import prepare

GROUPS, STAGES = 8, ((16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))


class EvoNorm(nn.Module):
    """EvoNorm-S0 (arXiv:2004.02967)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain, self.shift, self.slope = (nn.Parameter(torch.rand(channels) + 0.5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, *size = x.shape
        grouped = (batch, GROUPS, channels // GROUPS, *size)
        deviation = (x.reshape(grouped).var((2, 3, 4), keepdim=True) + 1e-5).sqrt()
        gated = x * torch.sigmoid(self.slope[:, None, None] * x)
        normal = (gated.reshape(grouped) / deviation).reshape(x.shape)
        return normal * self.gain[:, None, None] + self.shift[:, None, None]


def activation(kind: str, channels: int) -> nn.Module:
    if kind == "plain":
        return nn.ReLU()
    return EvoNorm(channels) if kind == "EvoNorm" else nn.Sequential(nn.GroupNorm(GROUPS, channels), nn.ReLU())


class Block(nn.Module):
    def __init__(self, kind: str, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.act1 = nn.Conv2d(inputs, width, 3, stride, 1), activation(kind, width)
        self.conv2, self.act2 = nn.Conv2d(width, width, 3, 1, 1), activation(kind, width)
        self.shortcut = nn.Identity() if inputs == width else nn.Conv2d(inputs, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(self.conv2(self.act1(self.conv1(x)))) + self.shortcut(x)


def network(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), activation(kind, 16))
    blocks = nn.Sequential(*(Block(kind, *sizes) for sizes in STAGES))
    return nn.Sequential(stem, blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


def fusion(kind: str, solver: str) -> FusionRun:
    inputs = FusionInputs([network(kind, seed) for seed in range(2)], example_inputs=torch.randn(2, 3, 16, 16))
    options = FusionOptions(solver=solver, device="cpu", threads=1)
    return FusionRun(prepare(inputs, options, default_manager(), trace_model))


@pytest.mark.parametrize("solver", ["wb", "weight-matching"])
def test_families(benchmark, solver: str) -> None:
    torch.set_num_threads(1)
    setups = {kind: fusion(kind, solver).setup for kind in ("plain", "EvoNorm", "GroupNorm")}
    taken = medians({kind: lambda setup=setup: FusionRun(setup).run() for kind, setup in setups.items()})
    benchmark.pedantic(lambda: None)
    for kind, seconds in taken.items():
        print(f"{solver}, {kind}: {seconds:.3f} s, {seconds / taken['plain']:.1f} times the plain network")
    assert min(taken.values()) > 0
