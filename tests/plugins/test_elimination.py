"""Many neurons at a time: what stands in for another must not go with it."""

from __future__ import annotations

import pytest
import torch
from mergeot_repair.refit import pruning
from mergeot_repair.refit.pruning import Products, Regression, eliminate
from torch import nn

from mergekit_ot import fuse, resolve_architecture


def test_of_a_network_and_its_copy_no_step_drops_a_neuron_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    # As of wide layers: several neurons go in one step.
    monkeypatch.setattr(pruning, "_STEPS", 4)
    torch.manual_seed(0)
    half = torch.randn(200, 24)
    products = Products(has_shift=False)
    products.add(torch.cat([half, half], 1), half @ torch.randn(24, 6))
    regression = Regression(products, torch.eye(6), torch.arange(48))
    left = eliminate([regression], {"g": [torch.arange(24), torch.arange(24, 48)]}, {"g": 24})["g"]
    assert sorted((left % 24).tolist()) == list(range(24))


def _behind_silence(seed: int) -> nn.Module:
    """A network of which half of the second layer reaches nothing, and half of the first reaches only that half."""
    torch.manual_seed(seed)
    net = resolve_architecture("mlp", arguments={"sizes": "5-8-8-3"})()
    with torch.no_grad():
        second, third = net.fc2.weight, net.fc3.weight
        third[:, ::2] = 0
        second[1::2, ::2] = 0
        second[::2, 1::2] = 0
        second[::2, ::2] *= 10
    return net.eval()


def test_a_layer_keeps_what_is_needed_by_what_was_kept_behind_it() -> None:
    nets = [_behind_silence(seed) for seed in (4, 5)]
    generator = torch.Generator().manual_seed(0)
    data, held_out = torch.randn(600, 5, generator=generator), torch.randn(200, 5, generator=generator)
    fused = fuse(nets, solver="wb", data=[data], calibration_size=480, repair="refit", device="cpu").model()
    with torch.no_grad():
        goal = (nets[0](held_out) + nets[1](held_out)) / 2
        # Chosen from the first layer to the last, a quarter of the variance and more would be lost.
        assert float((fused(held_out) - goal).var()) < 0.1 * float((goal - goal.mean(0)).var())
