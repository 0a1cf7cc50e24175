"""Exported programs that the user does not trust: only raw weights are taken from them, and nothing runs."""

from __future__ import annotations

import contextlib
import functools
import random
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from torch import Tensor, nn
from typer.core import TyperGroup

from mergekit_ot import CheckpointError, MergeotError, load_checkpoint, save_checkpoint
from mergekit_ot.cli.app import build_app
from mergekit_ot.hooks.manager import default_manager
from tests.alarm import alarm
from tests.malicious_programs import KINDS, MODULE, RUNNING, SOURCE, Plain, harmless_program, malicious_program


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a harmless program, another network of its kind, its architecture, data, and the module."""
    folder = tmp_path_factory.mktemp("programs")
    harmless_program(folder / "harmless.pt2")
    torch.manual_seed(1)
    torch.save(Plain().state_dict(), folder / "other.pt")
    (folder / "nets.py").write_text(SOURCE, encoding="utf-8")
    (folder / f"{MODULE}.py").write_text("open('executed', 'w').close()\n", encoding="utf-8")
    np.savez(folder / "data.npz", x=np.ones((4, 3), np.float32), y=np.zeros(4, np.int64))
    return folder


@pytest.fixture
def at(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same folder as the working folder, from which a named module could be imported."""
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setattr(torch.export, "load", _never)
    before = sorted(file.name for file in place.iterdir())
    yield place
    for name in ("evil.pt2", "out.pt", "out.pt2", "executed"):
        (place / name).unlink(missing_ok=True)
    assert sorted(file.name for file in place.iterdir() if file.name != "aligned") == before


def _never(*_: object, **__: object) -> None:
    raise RuntimeError("torch.export.load was called on a file that is not trusted")


ARCH = ["--arch", "nets.py:Plain"]
SHAPE = ["--input-shape", "3"]
COMMANDS = {
    "check": ["check", "evil.pt2"],
    "inspect": ["inspect", "evil.pt2"],
    "eval": ["eval", "harmless.pt2", "evil.pt2", "--data", "data.npz"],
    "fuse": ["fuse", "evil.pt2", "harmless.pt2", "-o", "out.pt"],
    "align": ["align", "harmless.pt2", "evil.pt2", "-o", "aligned"],
    "barrier": ["barrier", "harmless.pt2", "evil.pt2", "--data", "data.npz", "--points", "2"],
}
INTACT = ["expression as a size", "guard", "compiled library", "pickle at the root", "bomb beside the weights"]


@functools.cache
def program() -> TyperGroup:
    """The command line, built once: the tests run it some hundred times."""
    command = typer.main.get_command(build_app(default_manager()))
    assert isinstance(command, TyperGroup)
    return command


def run(*arguments: str) -> str:
    """Returns what an error of the input says, or nothing where there is none; anything else fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program().main(list(arguments), standalone_mode=False)
        except MergeotError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_runs_by_any_command_or_in_python(kind: str, at: Path) -> None:
    malicious_program(at / "harmless.pt2", kind, at / "evil.pt2", at / "executed")
    with alarm():
        for arguments in COMMANDS.values():
            assert "--trust" in run(*arguments)
        said = run(*COMMANDS["eval"], *ARCH)
        assert not said or "evil.pt2" in said
        assert (kind in INTACT) <= (not said)
        with contextlib.suppress(CheckpointError):
            checkpoint = load_checkpoint("evil.pt2")
            assert checkpoint.build is None
            assert checkpoint.example_inputs is None
            assert checkpoint.has_untouched_program
    assert not (at / "executed").exists()


@pytest.mark.parametrize("command", ["check", "inspect", "fuse", "align", "barrier"])
def test_nothing_runs_when_the_architecture_is_given(command: str, at: Path) -> None:
    for kind in INTACT[:2]:
        malicious_program(at / "harmless.pt2", kind, at / "evil.pt2", at / "executed")
        with alarm():
            said = run(*COMMANDS[command], *ARCH, *SHAPE)
        # What align writes would be the program once more.
        assert ("would hold the program of 'evil.pt2'" in said) == (command == "align")
        assert bool(said) == (command == "align")
        assert not (at / "executed").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_runs_by_any_command_with_an_architecture(kind: str, at: Path) -> None:
    malicious_program(at / "harmless.pt2", kind, at / "evil.pt2", at / "executed")
    with alarm():
        for arguments in COMMANDS.values():
            said = run(*arguments, *ARCH, *(SHAPE if arguments[0] != "eval" else []))
            assert not said or "evil.pt2" in said
    assert not (at / "executed").exists()


@pytest.mark.parametrize("kind", RUNNING)
def test_these_files_do_run_code_where_torch_loads_them(kind: str, place: Path, tmp_path: Path) -> None:
    """So that the tests above can fail."""
    mark = tmp_path / "executed"
    path = malicious_program(place / "harmless.pt2", kind, tmp_path / "evil.pt2", mark)
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.load(path).module()(torch.zeros(2, 3))
    assert mark.exists()


def test_raw_weights_are_those_of_the_program(place: Path) -> None:
    """Of every type and layout, shared and empty ones too."""

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 5), nn.Linear(3, 5)
            self.second.weight = self.first.weight
            self.turned = nn.Parameter(torch.randn(4, 3).T)
            self.norm = nn.BatchNorm1d(5)
            kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
            for number, kind in enumerate(kinds):
                self.register_buffer(f"buffer{number}", torch.arange(6).reshape(2, 3).to(kind))
            self.register_buffer("part", self.buffer0[1, 1:])
            self.register_buffer("empty", torch.zeros(0, 3))
            self.register_buffer("scalar", torch.tensor(2.5))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.norm(self.first(inputs) + self.second(inputs)).sum() + self.turned.sum() + self.scalar

    torch.manual_seed(0)
    program = torch.export.export(Many().eval(), (torch.randn(2, 3),))
    path = place / "many.pt2"
    torch.export.save(program, path)
    state = load_checkpoint(path).state
    path.unlink()
    assert set(state) == set(program.state_dict)
    for name, tensor in program.state_dict.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name


def test_other_members_are_not_unfolded(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    malicious_program(at / "harmless.pt2", "bomb beside the weights", at / "evil.pt2", at / "executed")
    opened: list[str] = []
    real = zipfile.ZipFile.open

    def noting(archive: zipfile.ZipFile, member: zipfile.ZipInfo, *rest: Any) -> Any:
        opened.append(member.filename.split("/", 1)[1])
        return real(archive, member, *rest)

    monkeypatch.setattr(zipfile.ZipFile, "open", noting)
    load_checkpoint("evil.pt2")
    assert opened[:2] == ["byteorder", "data/weights/model_weights_config.json"]
    assert sorted(opened[2:]) == [f"data/weights/weight_{number}" for number in range(4)]


def test_every_byte_may_be_wrong(at: Path) -> None:
    """A file with a wrong byte or a missing end is read as it was, or refused; no other error is raised."""
    content, draws = (at / "harmless.pt2").read_bytes(), random.Random(0)
    ends = content.rindex(b"data/weights/model_weights_config.json")
    for _ in range(150):
        changed = bytearray(content)
        changed[draws.choice([draws.randrange(len(content)), draws.randrange(ends, len(content))])] ^= draws.randrange(
            1, 256
        )
        (at / "evil.pt2").write_bytes(changed[: draws.choice([len(changed), draws.randrange(1, len(changed))])])
        with contextlib.suppress(CheckpointError), alarm():
            load_checkpoint("evil.pt2")


def test_a_program_is_written_from_a_trusted_one_only(at: Path) -> None:
    shutil.copy(at / "harmless.pt2", at / "evil.pt2")
    started: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mergekit_ot.jobs.fusing.fuse_with", lambda *_, **__: started.append("fuse"))
        said = run("fuse", "evil.pt2", "harmless.pt2", "-o", "out.pt2", *ARCH, *SHAPE)
    assert "'out.pt2' would hold the program of 'evil.pt2', which is not trusted" in said
    assert "--trust evil.pt2" in said
    assert started == []
    checkpoint = load_checkpoint("evil.pt2")
    with pytest.raises(CheckpointError, match="not trusted"):
        save_checkpoint(checkpoint.state, "out.pt2", template=checkpoint)
    assert not (at / "out.pt2").exists()


def test_only_inputs_can_be_trusted(at: Path) -> None:
    said = run("check", "harmless.pt2", "--trust", "other.pt")
    assert said.startswith("'other.pt' is to be trusted, and is none of the checkpoints that are read: harmless.pt2.")
    (at / "evil.pt2").write_text("models: [harmless.pt2, other.pt]\ntrust: third.pt2\n", encoding="utf-8")
    assert "'third.pt2' is to be trusted" in run("fuse", "--recipe", "evil.pt2")


def test_trust_is_given_file_by_file(at: Path) -> None:
    shutil.copy(at / "harmless.pt2", at / "evil.pt2")
    called: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.export, "load", lambda path: called.append(path) or _never())
        for recipe in (["fuse", "evil.pt2", "harmless.pt2", "--trust", "./harmless.pt2"],):
            assert "this version of torch reads" in run(*recipe, *ARCH, *SHAPE, "-o", "out.pt")
    assert called == [Path("harmless.pt2")]
