"""Fused networks wider than their sources: within the budget, where it is needed, and loadable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import commands
from depth_nets import IMAGES, Convolutional, filled
from torch import Tensor, nn

from mergekit_ot import fuse, load_checkpoint, resized
from mergekit_ot.errors import ArchitectureError, DataError, RecipeError

ROWS = [torch.randn(50, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]


def perceptron(first: int = 12, second: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, first),
        nn.ReLU(),
        nn.Linear(first, second),
        nn.BatchNorm1d(second),
        nn.ReLU(),
        nn.Linear(second, 3),
    )


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("factor", [1.2, 1.5, 2.0])
def test_the_fused_network_is_as_large_as_is_allowed_and_loads(factor: float) -> None:
    nets = [filled(perceptron(), seed) for seed in (0, 1)]
    result = fuse(nets, data=ROWS, widen=factor)
    model = result.model()
    assert 0.9 * factor < parameters(model) / parameters(nets[0]) <= factor
    assert result.growth is not None
    assert result.growth.parameters == (parameters(nets[0]), parameters(model))
    assert all(own < wide <= 2 * own for own, wide in result.growth.sizes.values())
    loaded = resized(perceptron(), result.state).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ROWS[0]), model(ROWS[0]))
    assert loaded[2].in_features == loaded[0].out_features == model[0].weight.shape[0]


def test_a_network_fused_with_itself_does_not_grow() -> None:
    net = filled(perceptron(), 0)
    result = fuse([net, net], data=ROWS, widen=2.0)
    assert result.growth is not None
    assert result.growth.sizes == {}
    with torch.no_grad():
        assert torch.allclose(result.model()(ROWS[0]), net(ROWS[0]), atol=1e-4)


def test_with_room_for_all_neurons_a_refit_computes_the_ensemble() -> None:
    nets = [filled(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), seed) for seed in (0, 1)]
    result = fuse(nets, data=ROWS, widen=2.0, repair="refit")
    with torch.no_grad():
        mean = sum(net(ROWS[0]) for net in nets) / 2
        apart = (result.model()(ROWS[0]) - mean).square().mean() / mean.var()
    narrow = fuse(nets, data=ROWS, repair="refit")
    with torch.no_grad():
        apart_before = (narrow.model()(ROWS[0]) - mean).square().mean() / mean.var()
    assert float(apart) < 0.3 * float(apart_before)


def test_the_layer_grows_whose_neurons_differ() -> None:
    one, other = filled(perceptron(), 0), filled(perceptron(), 0)
    with torch.no_grad():  # the first layers are the same, the second ones are not
        other[2].weight.copy_(torch.randn(8, 12, generator=torch.Generator().manual_seed(5)))
    result = fuse([one, other], data=ROWS, widen=1.3)
    assert result.growth is not None
    assert list(result.growth.sizes) == ["2.weight:0"]


def test_residual_streams_stay_as_wide_as_they_are() -> None:
    nets = [filled(Convolutional(2), seed) for seed in (0, 1)]
    images = [torch.randn(20, *IMAGES.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    result = fuse(nets, data=images, widen=1.6, repair="reset")
    assert result.growth is not None
    assert result.growth.sizes
    assert all("conv1" in key for key in result.growth.sizes)
    assert resized(Convolutional(2), result.state).stem.weight.shape == nets[0].stem.weight.shape


@pytest.mark.parametrize(
    ("nets", "options", "error", "match"),
    [
        ([nn.Linear(6, 3), nn.Linear(6, 3)], {"data": ROWS}, RecipeError, "No hidden layer of this network can grow"),
        ([perceptron(), perceptron()], {"example_inputs": ROWS[0]}, DataError, "--widen"),
        ([perceptron(), perceptron()], {"data": ROWS, "head": "both"}, RecipeError, "drop --widen"),
        ([perceptron(), perceptron()], {"data": ROWS, "widen": 3.0}, RecipeError, "less than or equal to 2"),
    ],
)
def test_what_cannot_be_widened_is_refused(
    nets: list[nn.Module], options: dict[str, object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        fuse(nets, **{"widen": 1.5, **options})  # type: ignore[arg-type]


def test_another_network_does_not_take_the_sizes() -> None:
    with pytest.raises(ArchitectureError, match=r"'0\.bias' is in the network or in the state"):
        resized(nn.Sequential(nn.Linear(2, 3)), {"0.weight": torch.zeros(3, 2)})
    with pytest.raises(ArchitectureError, match="has 2 axes in the network and 3"):
        resized(nn.Sequential(nn.Linear(2, 3, bias=False)), {"0.weight": torch.zeros(3, 2, 1)})


def test_the_command_writes_what_resized_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = commands(capsys)
    code = ("from test_widen import ROWS, perceptron", "import torch", "data = [(x, torch.zeros(50)) for x in ROWS]")
    Path("nets.py").write_text("\n".join(code), encoding="utf-8")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for seed, name in enumerate(("a.pt", "b.pt")):
        torch.save(filled(perceptron(), seed).state_dict(), name)
    flags = ("--arch", "nets.py:perceptron", "--data", "nets.py:data", "--widen", "1.4")
    told = json.loads(run("fuse", "a.pt", "b.pt", *flags, "--json"))
    before, after = told["widened"]["parameters"]
    state: dict[str, Tensor] = dict(load_checkpoint("fused.pt").state)
    assert parameters(resized(perceptron(), state)) == after <= 1.4 * before
    assert "mergekit_ot.resized(network, state)" in run("fuse", "a.pt", "b.pt", *flags)
