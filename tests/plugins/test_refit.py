"""Laws of the repair that refits linear maps."""

from __future__ import annotations

import re

import pytest
import torch
from mergeot_repair.programs.running import HeldBytes
from mergeot_repair.refit import one_pass
from mergeot_repair.refit.refit import RefitRepair
from nets import draw_norms
from torch import Tensor, nn

from mergekit_ot import DataError, evaluate, fuse, resolve_architecture
from mergekit_ot.fusion.calibration import calibration_batches


def _net(seed: int, batch_norm: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    net = resolve_architecture(
        "cnn", arguments={"channels": "6-8", "hidden": 12, "image": 8, "batch_norm": batch_norm}
    )()
    draw_norms(net)
    return net.eval()


def _data(count: int = 400) -> list[Tensor]:
    return [torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(3))]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_network_fused_with_itself_stays(batch_norm: bool) -> None:
    net, data = _net(0, batch_norm), _data()
    written = fuse([net, net], solver="wb", data=data, calibration_size=400, repair="refit", device="cpu").model()
    # That is the fused network, which is the source already; the repair alone must keep it as well.
    result = fuse([net, net], solver="wb", example_inputs=data[0][:100], device="cpu")
    batches = list(calibration_batches(data, 400, 100))
    alone = RefitRepair().repair(result.repair_context(result.state, (0.5, 0.5), batches))
    with torch.no_grad():
        one, other = net(data[0]), result.target.instance(alone)(data[0])
        assert torch.allclose(written(data[0]), one, atol=1e-5)
    assert float((one - other).abs().max()) < 1e-3 * float(one.abs().max())


@pytest.mark.parametrize("batch_norm", [False, True])
def test_it_comes_nearer_to_the_mean_of_the_sources(batch_norm: bool) -> None:
    nets, data = [_net(1, batch_norm), _net(2, batch_norm)], _data()
    held_out = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        goal = (nets[0](held_out) + nets[1](held_out)) / 2
        errors = {}
        for repair in ("none", "refit"):
            fused = fuse(
                nets, solver="activation-matching", data=data, calibration_size=400, repair=repair, device="cpu"
            )
            errors[repair] = float((fused.model()(held_out) - goal).square().mean())
    assert errors["refit"] < 0.7 * errors["none"]


def test_the_last_layer_is_a_ridge_regression_on_the_fused_inputs() -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)) for _ in range(2)]
    data = torch.randn(300, 5)
    fused = fuse(nets, solver="wb", data=[data], calibration_size=300, repair="refit", device="cpu").model()
    with torch.no_grad():
        inputs = torch.cat([torch.relu(fused[0](data)), torch.ones(300, 1)], 1).double()  # type: ignore[index]
        goal = sum(net(data) for net in nets).double() / 2  # type: ignore[union-attr]
        best = torch.linalg.lstsq(inputs, goal).solution
        least = float((inputs @ best - goal).square().sum())
        found = float((fused(data) - goal).square().sum())
    assert least <= found * (1 + 1e-9)
    assert found < 1.1 * least + 1e-6


def test_different_widths_are_refitted() -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3)) for width in (9, 14)]
    data = torch.randn(300, 5)
    with torch.no_grad():
        goal = (nets[0](data) + nets[1](data)) / 2
        errors = [
            float(
                (
                    fuse(nets, solver="wb", data=[data], calibration_size=300, repair=repair, device="cpu").model()(
                        data
                    )
                    - goal
                )
                .square()
                .mean()
            )
            for repair in ("none", "refit")
        ]
    assert errors[1] < 0.5 * errors[0]


def test_what_finds_no_room_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    nets, data = [_net(1, True), _net(2, True)], _data()
    result = fuse(nets, solver="average", example_inputs=data[0][:100], device="cpu")
    context = result.repair_context(result.state, (0.5, 0.5), list(calibration_batches(data, 400, 100)))
    with_room = RefitRepair().repair(context)
    monkeypatch.setattr(one_pass, "HeldBytes", lambda: HeldBytes(limit=0))
    without = RefitRepair().repair(context)
    assert all(torch.equal(value, without[name]) for name, value in with_room.items())


def test_sources_and_calibration_data_are_left_alone() -> None:
    nets, data = [_net(1, True), _net(2, True)], _data()
    before = [{name: value.clone() for name, value in net.state_dict().items()} for net in nets]
    kept = data[0].clone()
    fuse(nets, solver="wb", data=data, calibration_size=400, repair="refit", device="cpu")
    assert torch.equal(data[0], kept)
    for net, old in zip(nets, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in net.state_dict().items())


def test_a_procedure_that_changes_the_control_is_refused() -> None:
    from mergeot_repair.control import check_control

    nets, data = [_net(1), _net(2)], _data()
    result = fuse(nets, solver="wb", example_inputs=data[0][:100], device="cpu")
    batches = list(calibration_batches(data, 400, 100))
    context = result.repair_context(result.state, (0.5, 0.5), batches)

    def spoil(control):  # type: ignore[no-untyped-def]
        return {name: torch.randn_like(value) for name, value in control.fused.items()}

    with pytest.raises(DataError, match="untouched source"):
        check_control(context, "spoil", spoil)
    check_control(context, "keep", lambda control: control.fused)


def test_two_digit_networks_come_near_their_sources() -> None:
    from mergekit_ot import resolve_data

    train, test = list(resolve_data("digits?split=train")()), list(resolve_data("digits?split=test")())
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = resolve_architecture("mlp", arguments={"sizes": "64-32-32-10"})()
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(25):
            for inputs, targets in train:
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(inputs), targets).backward()
                optimizer.step()
        nets.append(net.eval())
    scores = [score.accuracy or 0 for score in evaluate(nets, test)]
    plain = fuse(nets, solver="activation-matching", data=train, device="cpu")
    refitted = fuse(nets, solver="activation-matching", data=train, repair="refit", device="cpu")
    before, after = (evaluate(one.model(), test).accuracy or 0 for one in (plain, refitted))
    assert after >= before
    assert after > sum(scores) / 2 - 2


def test_it_says_how_many_neurons_come_from_which_source() -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3)) for width in (9, 14)]
    data = torch.randn(300, 5)
    (note,) = fuse(nets, solver="wb", data=[data], calibration_size=300, repair="refit", device="cpu").notes
    taken, _, *of_each = map(int, re.findall(r"(\d+) (?:neurons|groups?|from)", note))
    assert taken == sum(of_each) == 9  # as many as the fused layer has
    assert fuse(nets, solver="wb", example_inputs=data, device="cpu").notes == ()
