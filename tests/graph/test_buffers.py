"""Buffers of the state dict move with their neurons, whatever the module is called and whatever a fresh one holds."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import PLAIN, names, samples
from random_networks.network import inputs_of, made
from torch import Tensor, nn
from torch.nn import functional as F

from mergekit_ot import SourceModel, check_model, fuse, trace_model
from mergekit_ot.cli.app import main
from mergekit_ot.errors import GraphMismatchError
from mergekit_ot.graph.ir import ModelGraph

_SPEC = importlib.util.spec_from_file_location("drawn", Path(__file__).with_name("test_random_networks.py"))
drawn_networks = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(drawn_networks)


class Frozen(nn.Module):
    """A norm whose affine map and statistics are buffers, as detectors have them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (b.reshape(1, -1, 1, 1) for b in self.buffers())
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), Frozen(8)
        self.inner, self.other, self.head = nn.Conv2d(8, 8, 3, padding=1), Frozen(8), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.stem(x)))
        return self.head(h + torch.relu(self.other(self.inner(h))))


class Between(nn.Module):
    """A buffer of eight entries between two linear layers."""

    buffer = torch.ones(8)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 2)
        self.register_buffer("kept", self.buffer.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)) * self.kept)


class Masked(Between):
    buffer = torch.ones(8, dtype=torch.bool)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.where(self.kept, self.first(x), 0.0))


class ZeroPoints(Between):
    buffer = torch.zeros(8, dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        return self.second((self.first(x) * 4 + self.kept).round())


class Pruned(Between):
    buffer = torch.ones(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(F.linear(x, self.first.weight * self.kept, self.first.bias)))


class Positions(Between):
    buffer = torch.zeros(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x) + self.kept[: x.shape[1]]))


class Picked(Between):
    """Whole numbers that say which neuron goes where: on a fresh instance, all the same one."""

    buffer = torch.zeros(8, dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))[..., self.kept])


class Waves(Between):
    """Frequencies in the file, as rotary tables were once kept."""

    buffer = torch.ones(8)

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[1]).to(x), self.kept)
        return self.second(self.first(x) * angles.cos())


class Filters(Between):
    """Fixed filters make the neurons; no source has them in another order."""

    buffer = torch.ones(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(x @ self.kept))


def trained(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Returns an instance whose buffers are no longer those of a fresh one."""
    torch.manual_seed(seed)
    model = make()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
        elif buffer.ndim > 0:
            buffer.copy_(torch.randint(0, 2 if buffer.dtype is torch.bool else 8, buffer.shape))
    return model


def claims(graph: ModelGraph) -> dict[str, object]:
    return {key: (group.is_free, group.members) for key, group in graph.groups.items()}


MOVED = {Backbone: 1, Between: 1, Masked: 1, ZeroPoints: 1, Pruned: 1, Positions: 1}
KEPT = (Picked, Waves, Filters)
_SHAPES = {Backbone: (2, 3, 6, 6)}


def _inputs(make: type[nn.Module]) -> Tensor:
    return torch.randn(_SHAPES.get(make, (2, 5, 3)), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", [*MOVED, *KEPT])
def test_what_is_free_does_not_depend_on_the_values_of_buffers(make: type[nn.Module]) -> None:
    inputs = _inputs(make)
    report = check_model(make, inputs, trials=1)
    assert report.groups == MOVED.get(make, 0)
    assert report.culprits == ()
    assert report.certified == report.groups
    graph = trace_model(trained(make, 3), inputs)
    assert claims(graph) == claims(report.graph) == claims(trace_model(make(), inputs))
    # The check of a trained instance finds the same, and random buffers never refute it.
    again = check_model(lambda: trained(make, 3), inputs, trials=1)
    assert (claims(again.graph), again.culprits) == (claims(report.graph), ())


@pytest.mark.parametrize("make", MOVED)
def test_a_buffer_is_reordered_and_averaged_with_its_neurons(make: type[nn.Module]) -> None:
    inputs = _inputs(make)
    one, other = trained(make, 1), trained(make, 2)
    result = fuse([one, other], example_inputs=inputs, solver="weight-matching")
    assert {report.name for report in result.groups} == set(trace_model(make(), inputs).free_groups)
    assert result.aligned_sources_max_error < 1e-5
    aligned = copy.deepcopy(other)
    aligned.load_state_dict(result.aligned_state(1))
    assert torch.allclose(aligned(inputs), other(inputs), atol=1e-5)
    for name, buffer in one.named_buffers():
        theirs, fused = aligned.get_buffer(name), result.state[name]
        assert fused.dtype == buffer.dtype
        if buffer.is_floating_point():
            assert torch.allclose(fused, (buffer + theirs) / 2)
        else:
            # Of masks every entry that one source has; whole numbers have no mean.
            assert torch.equal(fused, buffer | theirs if buffer.dtype is torch.bool else buffer)


def test_a_planted_order_of_frozen_norms_is_undone() -> None:
    inputs = _inputs(Backbone)
    model = trained(Backbone, 1)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(5))
    copied = copy.deepcopy(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in state.items():
        if not name.startswith("head"):
            state[name] = value[order]
        if name in ("inner.weight", "head.weight"):
            state[name] = state[name][:, order]
    copied.load_state_dict(state)
    assert torch.allclose(copied(inputs), model(inputs), atol=1e-5)
    result = fuse([model, copied], example_inputs=inputs)
    assert torch.allclose(result.model()(inputs), model(inputs), atol=1e-5)


def test_buffers_of_a_file_are_moved_by_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    start, end = source.index("class Frozen"), source.index("class Between")
    (tmp_path / "nets.py").write_text(f"import torch\nfrom torch import Tensor, nn\n\n\n{source[start:end]}", "utf-8")
    monkeypatch.chdir(tmp_path)
    models = {name: trained(Backbone, seed) for seed, name in enumerate(("a", "b"), 1)}
    for name, model in models.items():
        torch.save(model.state_dict(), f"{name}.pt")
    common = ["--arch", "nets.py:Backbone", "--input-shape", "3,6,6", "--json"]

    def outcome(*arguments: str) -> dict:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *common])
        assert ended.value.code in (0, None)
        return json.loads(capsys.readouterr().out)

    assert outcome("check", "a.pt")["groups"] == 1
    (row,) = outcome("align", "a.pt", "b.pt", "-o", "out")["outputs"]
    assert row["max_error"] < 1e-5
    moved = Backbone()
    moved.load_state_dict(torch.load(row["path"], weights_only=True))
    assert not torch.equal(moved.norm.weight, models["b"].get_buffer("norm.weight"))
    inputs = torch.randn(4, 3, 9, 9)
    assert torch.allclose(moved(inputs), models["b"](inputs), atol=1e-5)
    assert outcome("fuse", "a.pt", "b.pt", "-o", "fused.pt")["groups"]


def test_networks_that_differ_in_what_no_file_holds_are_traced_one_by_one() -> None:
    class Fixed(Between):
        def __init__(self, scale: Tensor) -> None:
            super().__init__()
            self.register_buffer("scale", scale, persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.0 + self.second(self.first(x) * self.scale)

    inputs = torch.randn(2, 3)
    same = [Fixed(torch.ones(8)), Fixed(torch.ones(8))]
    assert len(fuse(same, example_inputs=inputs).groups) == 1
    with pytest.raises(GraphMismatchError):
        fuse([same[0], Fixed(torch.arange(8.0))], example_inputs=inputs)


def agree(make: Callable[[], nn.Module], inputs: tuple[object, ...]) -> None:
    """What the check leaves free is what a fusion moves, of fresh instances and of trained ones."""
    report = check_model(make, inputs, trials=1)
    fresh = SourceModel("fresh", make, make().state_dict())
    for sources in ([fresh, fresh], [trained(make, 1), trained(make, 2)]):
        result = fuse(sources, example_inputs=inputs, dry_run=True)
        planned = {key for step in result.plan.steps for key in step.groups}
        assert planned == set(report.graph.free_groups)


_FEW = [case for case in names(*PLAIN) if case[1] in ("spectral_normed", "rotary", "data_dependent_branch")]


_MANY = [case for place, case in enumerate(names(*PLAIN)) if case not in _FEW and place % 2 == 0]


@pytest.mark.parametrize(("which", "name"), _FEW)
def test_check_and_fuse_agree(which: str, name: str) -> None:
    agree(samples(which)[name].make, samples(which)[name].inputs())


@pytest.mark.slow
@pytest.mark.parametrize(("which", "name"), _MANY)
def test_check_and_fuse_agree_on_every_second_architecture(which: str, name: str) -> None:
    agree(samples(which)[name].make, samples(which)[name].inputs())


def test_check_and_fuse_agree_on_random_networks() -> None:
    for description in drawn_networks.drawn(2):
        agree(lambda chosen=description: made(chosen), (inputs_of(description),))
