"""The zoo: keys and shapes of its networks, and its data."""

from __future__ import annotations

import subprocess
import sys

import mergeot_zoo
import pytest
import torch

from mergekit_ot import ArchitectureError, DataError
from mergekit_ot.hooks.manager import PluginManager
from mergekit_ot.sources.datasets import resolve_data
from mergekit_ot.sources.specs import resolve_architecture


@pytest.fixture
def manager() -> PluginManager:
    return PluginManager([mergeot_zoo])


@pytest.mark.parametrize(
    ("spec", "shape", "first"),
    [
        ("mlp", (1, 28, 28), ("fc1.weight", (400, 784))),
        ("mlp?sizes=64-7-10&bias=false", (1, 8, 8), ("fc1.weight", (7, 64))),
        ("mlp?sizes=64,7,10", (64,), ("fc1.weight", (7, 64))),
        ("cnn?image=8", (1, 8, 8), ("conv1.weight", (16, 1, 3, 3))),
        ("cnn?channels=4&hidden=5&in_channels=3&image=16", (3, 16, 16), ("conv1.weight", (4, 3, 3, 3))),
        ("vgg11?width=4", (3, 32, 32), ("features.0.weight", (4, 3, 3, 3))),
        ("vgg11?width=4&batch_norm=true&bias=false&image=64", (3, 64, 64), ("features.0.weight", (4, 3, 3, 3))),
        ("resnet20?width=4", (3, 32, 32), ("conv1.weight", (4, 3, 3, 3))),
        ("resnet20?width=5&classes=7&in_channels=1", (1, 16, 16), ("conv1.weight", (5, 1, 3, 3))),
    ],
)
def test_networks_take_their_inputs(manager, spec, shape, first):
    architecture = resolve_architecture(spec, manager)
    model = architecture().eval()
    assert architecture.is_registered
    name, size = next((key, tuple(value.shape)) for key, value in model.state_dict().items())
    assert (name, size) == first
    outputs = model(torch.randn(2, *shape))
    assert outputs.shape == (2, 7 if "classes=7" in spec else 10)
    assert outputs.isfinite().all()


def test_arguments_may_come_from_a_file(manager):
    model = resolve_architecture("mlp", manager, {"sizes": [6, 5, 4, 3], "bias": False})()
    assert [(name, tuple(value.shape)) for name, value in model.state_dict().items()] == [
        ("fc1.weight", (5, 6)),
        ("fc2.weight", (4, 5)),
        ("fc3.weight", (3, 4)),
    ]


def test_mlp_is_relu_between_linear_maps(manager):
    model = resolve_architecture("mlp?sizes=4-3-2", manager)()
    state = model.state_dict()
    inputs = torch.randn(5, 2, 2)
    hidden = (inputs.flatten(1) @ state["fc1.weight"].T + state["fc1.bias"]).clamp_min(0)
    torch.testing.assert_close(model(inputs), hidden @ state["fc2.weight"].T + state["fc2.bias"])


def test_resnet20_has_its_published_size(manager):
    model = resolve_architecture("resnet20", manager)()
    weights = dict(model.named_parameters())
    # 0.27 million parameters (arXiv:1512.03385, table 6), with shortcuts that have none.
    assert sum(value.numel() for value in weights.values()) == 269_722
    assert {name.split(".")[0] for name in weights} == {"conv1", "bn1", "layer1", "layer2", "layer3", "linear"}
    assert tuple(weights["layer2.0.conv1.weight"].shape) == (32, 16, 3, 3)
    assert not [name for name in weights if "shortcut" in name or "downsample" in name]


def test_resnet20_shortcut_pads_channels_on_both_sides(manager):
    block = resolve_architecture("resnet20?width=4", manager)().get_submodule("layer2.0").eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    inputs = torch.rand(1, 4, 6, 6)
    outputs = block(inputs)
    assert outputs.shape == (1, 8, 3, 3)
    torch.testing.assert_close(outputs[:, 2:6], inputs[:, :, ::2, ::2])
    assert outputs[:, :2].abs().sum() == outputs[:, 6:].abs().sum() == 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mlp?sizes=64", "at least 2"),
        ("mlp?sizes=64-x-10", "'x'"),
        ("mlp?sizes=64-0-10", "'0'"),
        ("cnn?channels=-3", "channels"),
        ("cnn?image=2", "image of 2 pixels"),
        ("vgg11?image=0", "image"),
        ("resnet20?width=0", "width: 0"),
    ],
)
def test_sizes_that_make_no_network_are_refused(manager, spec, message):
    with pytest.raises(ArchitectureError, match=message):
        resolve_architecture(spec, manager)()


def test_digits_are_split_once_and_for_all(manager):
    parts = {}
    for split, count in (("train", 1297), ("test", 500)):
        batches = list(resolve_data(f"digits?split={split}&batch=100", manager))
        inputs, targets = (torch.cat(part) for part in zip(*batches, strict=True))
        assert inputs.shape == (count, 1, 8, 8)
        assert inputs.dtype == torch.float32
        assert targets.dtype == torch.int64
        assert 0 <= inputs.min() < inputs.max() == 1
        assert max(len(batch) for batch, _ in batches) == 100
        share = targets.bincount() / count
        assert share.numel() == 10
        assert (share - 0.1).abs().max() < 0.01
        parts[split] = {tuple(row.flatten().tolist()) for row in inputs}
    assert not parts["train"] & parts["test"]


def test_digits_seed_orders_the_train_part_only(manager):
    def read(query: str) -> torch.Tensor:
        return torch.cat([inputs for inputs, _ in resolve_data(f"digits?{query}", manager)])

    one, other = read("split=train&seed=1"), read("split=train&seed=2")
    assert not torch.equal(one, other)
    assert torch.equal(one, read("split=train&seed=1"))
    rows = [sorted(map(tuple, part.flatten(1).tolist())) for part in (one, other)]
    assert rows[0] == rows[1]
    assert torch.equal(read("seed=1"), read("seed=2"))
    assert torch.equal(read("limit=30"), read("split=test")[:30])


@pytest.mark.parametrize("query", ["split=valid", "batch=0", "limit=-1"])
def test_digits_arguments_are_checked(manager, query):
    with pytest.raises(DataError, match=query.split("=")[1]):
        list(resolve_data(f"digits?{query}", manager))


def test_digits_without_scikit_learn_say_what_to_install(manager, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install .mergekit-ot\[demo\]"):
        list(resolve_data("digits", manager))


def test_listing_the_zoo_does_not_import_torch():
    code = "import sys; import mergeot_zoo as zoo; zoo.mergeot_datasets(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
