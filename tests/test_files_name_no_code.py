"""Checkpoints, data and recipes of every other kind name no code, and nothing that stands in them runs."""

from __future__ import annotations

import contextlib
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mergekit_ot import MergeotError, load_checkpoint, resolve_data
from mergekit_ot.cli.app import main
from mergekit_ot.recipe import make_recipe
from tests.alarm import alarm
from tests.malicious_programs import MODULE, Runs

COMMAND = "touch executed"
STATE = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}


class State:
    """What a pickle of this gives to a method that sets the state."""

    def __reduce__(self) -> tuple:
        return nn.Linear, (3, 2), {"_forward_hooks": {0: Runs(COMMAND)}, "training": eval}


class Scripted(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * 2


class Evaluates:
    def __reduce__(self) -> tuple:
        return eval, ("open('executed', 'w').close()",)


def _protocol(number: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(pickle.dumps(Runs(COMMAND), number))

    return write


def _saved(content: object, *, legacy: bool = False) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path, _use_new_zipfile_serialization=not legacy)


def _second_pickle(path: Path) -> None:
    torch.save(STATE, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", pickle.dumps(Runs(COMMAND), 0))


def _as_safetensors(path: Path) -> None:
    path.write_bytes(pickle.dumps(Runs(COMMAND), 2))


CHECKPOINTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    **{f"protocol {number}": ("a.pt", _protocol(number)) for number in range(6)},
    "beside a state": ("a.pt", _saved({"state_dict": STATE, "hook": Runs(COMMAND)})),
    "legacy": ("a.pth", _saved({"state_dict": STATE, "hook": Evaluates()}, legacy=True)),
    "whole module": ("a.pt", _saved(nn.Linear(3, 2))),
    "hooks of a module": ("a.pt", _saved(State())),
    "array of objects": ("a.pt", _saved({"state_dict": STATE, "log": np.array([Runs(COMMAND)], dtype=object)})),
    "second pickle": ("a.pt", _second_pickle),
    "script": ("a.pt", lambda path: torch.jit.script(Scripted()).save(str(path))),
    "pickle called safetensors": ("a.safetensors", _as_safetensors),
    "pickle called a program": ("a.pt2", _as_safetensors),
}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path(f"{MODULE}.py").write_text("open('executed', 'w').close()\n\n\ndef run(**_):\n    pass\n", encoding="utf-8")
    yield
    assert not Path("executed").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_nothing_in_a_checkpoint_runs(kind: str) -> None:
    """Nor where it is trusted: that is about programs."""
    name, write = CHECKPOINTS[kind]
    write(Path(name))
    for trust in (False, True) if name != "a.pt2" else (False,):
        with alarm(), contextlib.suppress(MergeotError):
            load_checkpoint(name, trust=trust)


NAMES = [
    "os:system",
    f"{MODULE}:run",
    f"{MODULE}.py:run",
    f"./{MODULE}.py:run",
    f"{MODULE}.py",
    "builtins:exec",
    "mlp?a=b",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_an_architecture_that_a_checkpoint_carries_is_a_registered_name(
    name: str, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {"format": "mergekit_ot", "version": 1, "architecture": name, "arguments": {"command": COMMAND}}
    if suffix == ".pt":
        torch.save({**said, "state_dict": STATE}, "a.pt")
    else:
        save_file(STATE, "a.safetensors", metadata={"mergekit_ot": json.dumps(said)})
    with alarm(), pytest.raises(SystemExit):
        main(["check", f"a{suffix}"])
    assert "which no installed plugin registers" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        f"models: !!python/object/apply:os.system ['{COMMAND}']",
        f"!!python/object/new:os.system ['{COMMAND}']",
        f"models: [a, b]\nsolver_options: {{a: !!python/name:{MODULE}.run ''}}",
        f"models: [a, b]\nseed: !!python/module:{MODULE} ''",
        "models: [a, b]\nseed: !!python/object/apply:builtins.eval [\"open('executed', 'w')\"]",
    ],
)
def test_nothing_in_a_recipe_runs(content: str) -> None:
    Path("recipe.yaml").write_text(content, encoding="utf-8")
    with alarm(), pytest.raises(MergeotError):
        make_recipe("recipe.yaml")


def test_nothing_in_an_archive_of_data_runs() -> None:
    np.savez("objects.npz", x=np.array([Runs(COMMAND)], dtype=object), y=np.zeros(1))
    with zipfile.ZipFile("pickle.npz", "w") as archive:
        for name in ("x.npy", "y.npy"):
            archive.writestr(name, pickle.dumps(Runs(COMMAND)))
    header = b"{'descr': __import__('os').system('" + COMMAND.encode() + b"'), 'fortran_order': False, 'shape': (1,)}\n"
    with zipfile.ZipFile("header.npz", "w") as archive:
        for name in ("x.npy", "y.npy"):
            archive.writestr(name, b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(8))
    Path("bare.npz").write_bytes(pickle.dumps(Runs(COMMAND)))
    for name in ("objects.npz", "pickle.npz", "header.npz", "bare.npz"):
        with alarm(), contextlib.suppress(Exception):  # what is said of it is tested elsewhere
            list(resolve_data(name)())


@pytest.mark.parametrize("runs", [Runs(COMMAND), Evaluates()])
def test_the_alarm_rings_where_something_runs(runs: object) -> None:
    """So that the tests above can fail."""
    with pytest.raises(AssertionError), alarm():
        pickle.loads(pickle.dumps(runs))
    assert Path("executed").exists()
    Path("executed").unlink()
