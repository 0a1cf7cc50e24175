"""A rule whose claim is a little wrong leads to a little of another function, and is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mergekit_ot import EinRule, PluginManager, ResultError, fuse, hookimpl


class Leaning(nn.Module):
    """Every neuron, and a hundredth of the running sum before it."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.01 * torch.cumsum(x, 1)


def test_a_hundredth_of_another_function_is_another_function() -> None:
    lie = hookimpl(lambda: {"module:Leaning": EinRule("b n -> b n", ("input0",))})
    manager = PluginManager.load()
    manager.register(SimpleNamespace(mergeot_node_rules=lie), "lying")
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(6, 8), Leaning(), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2)]
    with pytest.raises(ResultError, match=r"computes something else than before: its outputs differ by 0\.0\d"):
        fuse(nets, example_inputs=torch.randn(3, 6), manager=manager, device="cpu")
