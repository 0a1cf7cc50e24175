"""REPAIR of a map with a bias, whose BatchNorm has neither scale nor shift."""

from __future__ import annotations

import torch
from mergeot_repair.moments import MomentsRepair
from torch import Tensor, nn

from mergekit_ot import fuse


def _net(data: Tensor, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        for part in data.split(100):
            net(part)
    return net.eval()


def test_values_are_scaled_and_nothing_else() -> None:
    data = torch.randn(200, 6, generator=torch.Generator().manual_seed(1)) + 0.5
    nets = [_net(data, seed) for seed in range(2)]
    result = fuse(nets, solver="wb", example_inputs=data[:100], device="cpu")
    context = result.repair_context(result.state, (0.5, 0.5), [(part,) for part in data.split(100)])
    state = MomentsRepair().repair(context)
    with torch.no_grad():
        before, after = (context.instance(held)[:2](data) for held in (result.state, state))  # type: ignore[index]
    factor = after.std(0) / before.std(0)
    assert float((factor - 1).abs().max()) > 0.1
    # With no shift to set, the mean follows the deviation.
    torch.testing.assert_close(after, factor * before, rtol=1e-4, atol=1e-4)
