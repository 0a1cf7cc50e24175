"""Checkpoints in the safetensors format, through the functions that everyone calls."""

from __future__ import annotations

import json
from pathlib import Path

import mergeot_safetensors
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mergekit_ot import CheckpointError, load_checkpoint, save_checkpoint
from mergekit_ot.hooks.manager import PluginManager


@pytest.fixture
def manager() -> PluginManager:
    return PluginManager([mergeot_safetensors])


def _state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(3, 4, generator=generator),
        "half": torch.randn(2, generator=generator).to(torch.bfloat16),
        "bn.num_batches_tracked": torch.tensor(7),
    }


def test_round_trip_keeps_tensors_and_what_the_file_says(tmp_path, manager):
    path = save_checkpoint(
        _state(),
        tmp_path / "net.safetensors",
        architecture="mlp",
        arguments={"sizes": [4, 3], "bias": False},
        input_shape=(4,),
        provenance={"solver": "wb", "seed": 0},
        manager=manager,
    )
    assert path.read_bytes()[:2] != b"PK"
    checkpoint = load_checkpoint(path, manager)
    assert checkpoint.architecture == "mlp"
    assert checkpoint.arguments == {"sizes": [4, 3], "bias": False}
    assert checkpoint.input_shape == (4,)
    assert checkpoint.provenance == {"solver": "wb", "seed": 0}
    assert len(checkpoint.sha256) == 64
    assert set(checkpoint.state) == set(_state())
    for name, tensor in _state().items():
        assert checkpoint.state[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.state[name], tensor)


def test_tied_and_transposed_tensors_are_written(tmp_path, manager):
    weight = torch.arange(6.0).reshape(2, 3)
    path = save_checkpoint({"a": weight, "b": weight, "c": weight.t()}, tmp_path / "tied.safetensors", manager=manager)
    state = load_checkpoint(path, manager).state
    assert torch.equal(state["a"], weight)
    assert torch.equal(state["b"], weight)
    assert torch.equal(state["c"], weight.t())


def test_file_of_another_tool_is_a_bare_state(tmp_path, manager):
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    checkpoint = load_checkpoint(tmp_path / "other.safetensors", manager)
    assert (checkpoint.architecture, checkpoint.input_shape) == (None, None)
    assert torch.equal(checkpoint.state["weight"], torch.ones(2))


@pytest.mark.parametrize("kept", [0, 5, 60, -3])
def test_truncated_file_is_refused(tmp_path, manager, kept):
    path = save_checkpoint(_state(), tmp_path / "net.safetensors", manager=manager)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"net\.safetensors.*(truncated|empty)"):
        load_checkpoint(path, manager)


@pytest.mark.parametrize(
    ("entry", "message"),
    [("{", "damaged"), ("[]", "damaged"), (json.dumps({"version": 2}), "newer version")],
)
def test_header_that_cannot_be_read_is_refused(tmp_path, manager, entry, message):
    save_file({"weight": torch.ones(2)}, tmp_path / "net.safetensors", metadata={"mergekit_ot": entry})
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "net.safetensors", manager)


def test_other_formats_are_left_to_others(tmp_path, manager):
    path = save_checkpoint(_state(), tmp_path / "net.pt", manager=manager)
    assert path.read_bytes()[:2] == b"PK"
    assert set(load_checkpoint(path, manager).state) == set(_state())


def test_the_same_state_is_the_same_file_to_the_last_byte(tmp_path: Path):
    state = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(2)}
    for number in range(8):
        save_checkpoint(state, tmp_path / f"{number}.safetensors", provenance={"name": "ä"})
    assert len({(tmp_path / f"{number}.safetensors").read_bytes() for number in range(8)}) == 1
    assert load_checkpoint(tmp_path / "0.safetensors").provenance == {"name": "ä"}
    with safe_open(tmp_path / "0.safetensors", "pt") as opened:
        assert opened.metadata()["format"] == "pt"
