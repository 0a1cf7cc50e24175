"""Reading and writing checkpoints: what is found, what is refused, and that nothing is executed or half-written."""

from __future__ import annotations

import argparse
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mergekit_ot.api import load_checkpoint, save_checkpoint
from mergekit_ot.errors import CheckpointError
from mergekit_ot.storage.finite import check_finite
from mergekit_ot.storage.state_dicts import find_state


def _state() -> OrderedDict[str, torch.Tensor]:
    torch.manual_seed(0)
    return OrderedDict(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).state_dict())


def _same(one: object, other: object) -> bool:
    assert isinstance(one, dict)
    assert isinstance(other, dict)
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


class _Runs:
    """An object whose pickle runs a function when it is loaded the unsafe way."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"epoch": 3, "model_state_dict": state, "args": {"lr": 0.1}},
        lambda state: {"best": torch.tensor(0.9), "net": {"inner": state}},
        lambda state: {"state_dict": OrderedDict((f"module.{name}", value) for name, value in state.items())},
        lambda state: {f"_orig_mod.module.{name}": value for name, value in state.items()},
        lambda state: {"model": state, "optimizer": {"state": {0: {"m": torch.ones(3), "v": torch.ones(3)}}}},
        lambda state: {"args": argparse.Namespace(width=5), "acc": np.float64(0.5), "log": np.ones(3), "model": state},
    ],
)
def test_state_dict_is_found_inside_wrappers(tmp_path: Path, wrap, legacy: bool) -> None:
    path = tmp_path / "model.checkpoint"
    torch.save(wrap(_state()), path, _use_new_zipfile_serialization=not legacy)
    checkpoint = load_checkpoint(path)
    assert _same(dict(checkpoint.state), dict(_state()))
    assert f"{len(_state())} tensors" in checkpoint.found
    assert len(checkpoint.sha256) == 64


@given(st.lists(st.sampled_from(["a", "model", "module", "x.y"]), max_size=3), st.integers(1, 4))
def test_state_dict_is_found_at_any_depth(path: list[str], count: int) -> None:
    content: object = {f"layer{i}.weight": torch.full((2,), float(i)) for i in range(count)}
    expected = content
    for key in path:
        content = {key: content, "epoch": 1}
    found = find_state(content)
    assert found is not None
    assert found.state == expected


def test_prefix_stays_where_one_name_lacks_it() -> None:
    found = find_state({"module.a": torch.ones(1), "b": torch.ones(1)})
    assert found is not None
    assert set(found.state) == {"module.a", "b"}


def test_optimizer_state_is_never_taken() -> None:
    assert find_state({"optimizer": {"state": {"m": torch.ones(2)}}, "epoch": 2}) is None


@pytest.mark.parametrize("legacy", [False, True])
def test_code_is_refused_and_never_executed(tmp_path: Path, legacy: bool) -> None:
    mark, path = tmp_path / "executed", tmp_path / "evil.pt"
    torch.save({"state_dict": _state(), "hook": _Runs(mark)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"carries code.*pathlib.*state_dict\(\)"):
        load_checkpoint(path)
    assert not mark.exists()


def test_code_in_a_bare_pickle_is_named(tmp_path: Path) -> None:
    mark, path = tmp_path / "executed", tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(_Runs(mark)))
    with pytest.raises(CheckpointError, match=r"carries code.*pathlib"):
        load_checkpoint(path)
    assert not mark.exists()


def test_whole_module_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match=r"torch.nn.modules.linear.Linear.*state_dict\(\)"):
        load_checkpoint(tmp_path / "module.pt")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.99])
def test_truncated_file_is_a_clear_error(tmp_path: Path, legacy: bool, share: float) -> None:
    whole, path = tmp_path / "whole.pt", tmp_path / "cut.pt"
    torch.save({"w": torch.randn(100, 100)}, whole, _use_new_zipfile_serialization=not legacy)
    content = whole.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"truncated|damaged"):
        load_checkpoint(path)


def test_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    save_checkpoint(_state(), tmp_path / "model_0.pt")
    with pytest.raises(CheckpointError, match=r"Did you mean .*model_0.pt"):
        load_checkpoint(tmp_path / "model0.pt")
    with pytest.raises(CheckpointError, match=r"folder .* does not exist"):
        load_checkpoint(tmp_path / "nowhere" / "model0.pt")
    with pytest.raises(CheckpointError, match=r"is a folder"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF" + bytes(50), "GGUF.*unquantised"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"no checkpoint at all", "not a PyTorch checkpoint"),
    ],
)
def test_foreign_formats_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "foreign").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "foreign")


def test_file_without_tensors_says_what_it_holds(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "loss": 0.1}, tmp_path / "log.pt")
    with pytest.raises(CheckpointError, match=r"no state dict.*epoch, loss"):
        load_checkpoint(tmp_path / "log.pt")


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"fc.qweight": torch.zeros(4, dtype=torch.int32), "fc.scales": torch.ones(2)}, tmp_path / "q.pt")
    with pytest.raises(CheckpointError, match=r"fc.qweight.*Dequantise"):
        load_checkpoint(tmp_path / "q.pt")


def test_own_checkpoint_returns_all_it_was_given(tmp_path: Path) -> None:
    path = save_checkpoint(
        _state(),
        tmp_path / "own.pt",
        architecture="mlp",
        arguments={"widths": [5, 2]},
        input_shape=(6,),
        provenance={"seed": 1},
    )
    checkpoint = load_checkpoint(path)
    assert _same(dict(checkpoint.state), dict(_state()))
    assert (checkpoint.architecture, checkpoint.arguments) == ("mlp", {"widths": [5, 2]})
    assert (checkpoint.input_shape, checkpoint.provenance) == ((6,), {"seed": 1})
    raw = torch.load(path, weights_only=True)
    assert raw["format"] == "mergekit_ot"
    assert raw["version"] == 1


def test_own_checkpoint_keeps_names_that_look_like_wrappers(tmp_path: Path) -> None:
    state = {"module.weight": torch.ones(2), "module.bias": torch.zeros(2)}
    assert set(load_checkpoint(save_checkpoint(state, tmp_path / "own.pt")).state) == set(state)


def test_saved_view_does_not_carry_its_storage(tmp_path: Path) -> None:
    whole = torch.zeros(1000, 1000)
    path = save_checkpoint({"w": whole[:2]}, tmp_path / "view.pt")
    assert path.stat().st_size < 50_000


def test_the_same_weights_give_the_same_file(tmp_path: Path) -> None:
    one, other = (save_checkpoint(_state(), tmp_path / name, architecture="mlp") for name in ("one.pt", "other.pt"))
    assert one.read_bytes() == other.read_bytes()


def test_failed_save_leaves_the_old_file_and_nothing_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_checkpoint(_state(), tmp_path / "own.pt")
    before = path.read_bytes()

    def fails(content: object, stream: IO[bytes]) -> None:
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(CheckpointError, match=r"No space left"):
        save_checkpoint({"w": torch.ones(3)}, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["own.pt"]


def test_save_refuses_what_is_not_plain_data_and_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not plain data"):
        save_checkpoint(_state(), tmp_path / "own.pt", arguments={"activation": nn.ReLU()})
    with pytest.raises(CheckpointError, match=r"does not exist"):
        save_checkpoint(_state(), tmp_path / "nowhere" / "own.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.complex64])
def test_weights_that_are_not_finite_are_named(bad: float, dtype: torch.dtype) -> None:
    state = {"steps": torch.tensor(3), "fine": torch.ones(2), "broken": torch.tensor([1.0, bad]).to(dtype)}
    with pytest.raises(CheckpointError, match=r"'broken' of 'a.pt' has 1 of 2"):
        check_finite(state, "a.pt")
    check_finite({"steps": torch.tensor(3), "fine": torch.ones(2, dtype=dtype)}, "a.pt")


def test_an_archive_with_another_beginning_is_not_called_truncated(tmp_path: Path) -> None:
    path = tmp_path / "changed.pt"
    torch.save({"w": torch.randn(100, 100)}, path)
    path.write_bytes(b"XX" + path.read_bytes()[2:])
    with pytest.raises(CheckpointError, match=r"is damaged: it ends as an archive of torch does"):
        load_checkpoint(path)


def test_a_link_that_leads_to_itself_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    with pytest.raises(CheckpointError, match=r"loop.pt' is a link that leads to no file"):
        load_checkpoint(tmp_path / "loop.pt")
