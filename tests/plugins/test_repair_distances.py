"""How far a repaired network is from its sources: where nothing is left to repair, and where all is turned round."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from mergekit_ot import AbstractRepair, FusionResult, PluginManager, RepairContext, fuse, hookimpl
from mergekit_ot.fusion.comparison import Distance


class Negating(AbstractRepair):
    """Turns all outputs round."""

    needs_data = False

    def repair(self, context: RepairContext) -> dict[str, Tensor]:
        last = list(context.fused)[-1]
        return {**context.fused, last: -context.fused[last]}


def _net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)).eval()


def _fuse(nets: list[nn.Module], repair: str, manager: PluginManager | None = None) -> FusionResult:
    data = torch.randn(200, 6, generator=torch.Generator().manual_seed(3))
    return fuse(nets, solver="wb", data=[data], repair=repair, device="cpu", manager=manager)


def test_where_nothing_is_left_to_repair_nothing_is_changed_or_said() -> None:
    net = _net(0)
    nets = [net, copy.deepcopy(net)]
    plain, repaired = _fuse(nets, "none"), _fuse(nets, "refit")
    assert repaired.repair_comparison is not None
    assert not repaired.repair_comparison.is_written
    assert not [warning for warning in repaired.warnings if "repair" in warning]
    assert all(torch.equal(repaired.state[name], plain.state[name]) for name in plain.state)


def test_a_network_that_says_the_opposite_is_no_nearer_than_one_that_says_nothing() -> None:
    manager = PluginManager.load()
    manager.register(SimpleNamespace(mergeot_repairs=hookimpl(lambda: {"negating": Negating})), "mine")
    found = _fuse([_net(0), _net(1)], "negating", manager).repair_comparison
    assert found is not None
    # Scaled by the best number that is not negative, which is zero.
    assert found.repaired.scaled == 1
    assert found.unrepaired.scaled < 1
    assert not found.is_written


def test_a_repair_must_be_no_farther_in_both_ways() -> None:
    nan = float("nan")
    assert Distance(1.0, 1.0).is_no_farther(Distance(1.0, 1.0))
    for farther in (Distance(0.5, 1.1), Distance(1.1, 0.5), Distance(nan, 0.5), Distance(0.5, nan)):
        assert not farther.is_no_farther(Distance(1.0, 1.0))
