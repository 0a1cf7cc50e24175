"""Sources whose BatchNorm statistics were never right, on data that are theirs."""

from __future__ import annotations

import pytest
import torch
from mergeot_repair.control import reestimated
from torch import Tensor, nn

from mergekit_ot import DataError, fuse


def _net(data: Tensor, seed: int) -> nn.Module:
    """A network that remembers the right means, and wrong variances."""
    torch.manual_seed(seed)
    norm = nn.BatchNorm1d(16)
    net = nn.Sequential(nn.Linear(8, 16), norm, nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        norm.running_mean = net[0](data).mean(0)
        norm.running_var = torch.logspace(-2, 2, 16)[torch.randperm(16)]
    return net


def test_a_repair_that_fits_maps_can_do_with_them_and_one_that_relies_on_them_cannot() -> None:
    data = torch.randn(240, 8, generator=torch.Generator().manual_seed(5))
    nets = [_net(data, seed) for seed in range(2)]
    fused = fuse(nets, solver="wb", data=[data], repair="refit", device="cpu")
    assert fused.repair_comparison is not None
    assert fused.repair_comparison.is_written
    with pytest.raises(DataError, match="do not look like what the sources were trained on"):
        fuse(nets, solver="wb", data=[data], repair="reset", device="cpu")


def test_how_often_the_sources_were_trained_stays_in_their_counters() -> None:
    data = torch.randn(40, 8, generator=torch.Generator().manual_seed(5))
    net = _net(data, 0)
    net[1].num_batches_tracked.fill_(7)  # type: ignore[index]
    result = fuse([net, net], solver="average", example_inputs=data[:20], device="cpu")
    context = result.repair_context(result.state, (0.5, 0.5), [(part,) for part in data.split(20)])
    state = reestimated(context.instance(result.state), context.batches)
    assert not torch.equal(state["1.running_var"], result.state["1.running_var"])
    assert int(state["1.num_batches_tracked"]) == 7
