"""Out as in: a result is in the container of its source, and whoever reads the source reads it the same way."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import commands
from file_kinds import KINDS, NETS, ON, Kind, into_net, make_net, of_arrays, state_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from mergekit_ot import CheckpointError, load_checkpoint, save_checkpoint

Command = Callable[..., str]
_REPRESENTATIVE = ("plain", "lightning", "average taken", "npz", "pickled client")


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Gives a way to run commands in a folder of networks; returns what they print on standard error."""
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS, encoding="utf-8")

    return commands(capsys)


def _written(kind: Kind) -> tuple[str, str]:
    names = (f"a{kind.end}", f"b{kind.end}")
    for seed, name in enumerate(names):
        kind.dump(kind.content(state_of(seed)), name)
    return names


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_who_reads_the_source_reads_the_result(command: Command, kind: Kind) -> None:
    """With all weight on the first source the result holds exactly its tensors, in its container."""
    names, output = _written(kind), f"out{kind.end}"
    said = command("fuse", *names, "-o", output, "--model-weights", "1,0", *ON, *kind.flags)
    for part in kind.says:
        assert part in said
    wanted, found = kind.read(names[0]) if kind.end != ".safetensors" else into_net(state_of(0)), kind.read(output)
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype
    if kind.name not in _REPRESENTATIVE:
        return
    # A second run replaces what the first one wrote, and takes it for a source as the first one took the source.
    command("fuse", output, names[1], "-o", f"again{kind.end}", "--model-weights", "1,0", *ON, *kind.flags)
    command("fuse", *names, "-o", output, "--model-weights", "1,0", *ON, *kind.flags)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=kind.name, marks=[] if kind.name in _REPRESENTATIVE else pytest.mark.slow)
        for kind in KINDS
        if kind.name != "safetensors"  # its reader expects a fusion
    ],
)
def test_an_aligned_file_is_in_its_own_container(command: Command, kind: Kind) -> None:
    torch.save(state_of(5), "reference.pt")
    _written(kind)
    command("align", "reference.pt", f"b{kind.end}", "-o", "aligned", *ON, *kind.flags)
    source, aligned = kind.read(f"b{kind.end}"), kind.read(f"aligned/b{kind.end}")
    inputs = torch.randn(5, 4)
    one, other = make_net().eval(), make_net().eval()
    for net, state in ((one, source), (other, aligned)):
        net.load_state_dict({name: state[name].float() for name in net.state_dict()})
    assert torch.allclose(one(inputs), other(inputs), atol=1e-2 if kind.name == "voice" else 1e-5)
    assert not torch.equal(source["0.weight"], aligned["0.weight"])


def test_the_file_beside_says_the_architecture(command: Command) -> None:
    torch.manual_seed(0)
    for name in "ab":
        mlp = nn.ModuleDict({"fc1": nn.Linear(3, 5), "fc2": nn.Linear(5, 2)})
        torch.save(mlp.state_dict(), f"{name}.pt")
    on = ("--arch", "mlp?sizes=3-5-2")
    command("fuse", "a.pt", "b.pt", "-o", "f.pt", "--input-shape", "3", *on)
    assert set(torch.load("f.pt")) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    said = json.loads(Path("f.pt.json").read_text())
    assert said["provenance"]["solver"] == "wb"
    checkpoint = load_checkpoint("f.pt")
    assert (checkpoint.architecture, checkpoint.input_shape) == ("mlp", (3,))
    assert said["sha256"] == checkpoint.sha256
    np.savez("d.npz", x=np.ones((4, 3), np.float32), y=np.zeros(4, np.int64))
    assert "f.pt.json' says, architecture 'mlp'" in command("eval", "f.pt", "--data", "d.npz")
    # Beside another file it says nothing.
    torch.save(torch.load("a.pt"), "f.pt")
    assert load_checkpoint("f.pt").architecture is None
    assert "describes another file" in load_checkpoint("f.pt").found


def test_what_stands_where_the_description_goes_is_found_before_any_work(command: Command) -> None:
    for seed, name in enumerate("ab"):
        torch.save(state_of(seed), f"{name}.pt")
    Path("f.pt.json").write_text("mine", encoding="utf-8")
    said = command("fuse", "a.pt", "b.pt", "-o", "f.pt", *ON, status=1)
    assert "'f.pt.json' exists and was not written by mergeot" in said
    assert not Path("f.pt").exists()
    said = command("fuse", "a.pt", "b.pt", "-o", "f.npz", *ON)
    assert "f.npz: how it was made stands in 'f.npz.json'" in said
    assert of_arrays(dict(np.load("f.npz"))).keys() == state_of(0).keys()


def test_another_container_is_had_by_its_name(command: Command) -> None:
    kind = next(kind for kind in KINDS if kind.name == "lightning")
    names = _written(kind)
    on = (*ON, *kind.flags, "--model-weights", "1,0")
    command("fuse", *names, "-o", "bare.pt", "--format", "state-dict", *on)
    assert into_net(torch.load("bare.pt")).keys() == state_of(0).keys()
    command("fuse", *names, "-o", "own.pt", "--format", "mergeot", *on)
    assert torch.load("own.pt")["format"] == "mergekit_ot"
    assert list(load_checkpoint("own.pt").state) == list(state_of(0))
    assert not Path("own.pt.json").exists()
    command("fuse", *names, "-o", "x.safetensors", *on)
    assert list(load_checkpoint("x.safetensors").state).sort() == list(state_of(0)).sort()
    said = command("fuse", *names, "-o", "y.safetensors", "--format", "mergeot", *on, status=1)
    assert "has the format of its name" in said
    assert "'torch' is no format: it is source, state-dict" in command("fuse", *names, "--format", "torch", status=1)


def test_own_files_stay_own_files(command: Command) -> None:
    for seed, name in enumerate("ab"):
        save_checkpoint(state_of(seed), f"{name}.pt")
    command("fuse", "a.pt", "b.pt", "-o", "f.pt", *ON)
    assert torch.load("f.pt")["format"] == "mergekit_ot"
    assert not Path("f.pt.json").exists()


def test_a_target_of_other_sizes_is_in_the_container_of_the_first_source(command: Command) -> None:
    kind = next(kind for kind in KINDS if kind.name == "lightning")
    command("fuse", *_written(kind), "-o", "s.ckpt", *ON, *kind.flags, "--target", "nets.py:net?hidden=4")
    content = torch.load("s.ckpt")
    assert content.keys() == {"epoch", "pytorch-lightning_version", "hyper_parameters", "state_dict"}
    small = make_net(4)
    small.load_state_dict({name.removeprefix("model."): tensor for name, tensor in content["state_dict"].items()})


def test_a_result_without_a_name_ends_as_its_source(command: Command) -> None:
    for seed, name in enumerate("ab"):
        save_file(dict(state_of(seed)), f"{name}.safetensors")
    command("fuse", "a.safetensors", "b.safetensors", *ON)
    assert Path("fused.safetensors").exists()


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3),
    max_leaves=8,
)
_BESIDE = st.dictionaries(st.text("xyz", min_size=1, max_size=3), _PLAIN, max_size=3)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.tuples(st.sampled_from(["state", "model", "q.r", "net"]), _BESIDE), max_size=3), st.booleans())
def test_what_is_read_and_written_again_is_the_same(levels: list[tuple[str, dict[str, Any]]], legacy: bool) -> None:
    """Nesting, keys and plain entries stay as they are, whatever they are."""
    content: dict[str, Any] = {"module.weight": torch.arange(6.0).reshape(2, 3), "module.steps": torch.tensor(3)}
    for key, beside in levels:
        content = {**beside, key: content}
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "a.pt"), Path(folder, "b.pt")
        torch.save(content, source, _use_new_zipfile_serialization=not legacy)
        template = load_checkpoint(source)
        save_checkpoint(template.state, output, template=template)
        written = torch.load(output)
        save_checkpoint(load_checkpoint(output).state, output, template=load_checkpoint(output))
        for key, beside in reversed(levels):
            assert {name: value for name, value in written.items() if name != key} == beside
            assert list(written) == list({**beside, key: None})
            written = written[key]
        assert {name: tensor.tolist() for name, tensor in written.items()} == {
            "module.weight": [[0, 1, 2], [3, 4, 5]],
            "module.steps": 3,
        }


def test_in_python_a_template_gives_the_container(tmp_path: Path) -> None:
    torch.save({"epoch": 1, "params": state_of(0), "params_ema": state_of(1)}, tmp_path / "a.pt")
    template = load_checkpoint(tmp_path / "a.pt", state_key="params_ema")
    assert torch.equal(template.state["0.weight"], state_of(1)["0.weight"])
    save_checkpoint(state_of(2), tmp_path / "b.pt", template=template)
    content = torch.load(tmp_path / "b.pt")
    assert list(content) == ["epoch", "params_ema"]
    assert torch.equal(content["params_ema"]["0.weight"], state_of(2)["0.weight"])
    with pytest.raises(CheckpointError, match=r"no state dict under the key 'ema'. It has one under: 'params', "):
        load_checkpoint(tmp_path / "a.pt", state_key="ema")
