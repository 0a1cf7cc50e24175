"""Exported programs as sources: no architecture is named, nothing in the file is executed."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from mergekit_ot import CheckpointError, check_model, fuse, load_checkpoint
from mergekit_ot.cli.app import build_app
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.hooks.manager import default_manager


class Net(nn.Module):
    """A recurrent net with a constant, traced at a batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Linear(5, 7), nn.LSTM(7, 9, batch_first=True), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(torch.relu(self.embed(x)))[0].mean(1)) * torch.tensor([1.0, 2.0])


SOURCE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.cell, self.head = nn.Linear(5, 7), nn.LSTM(7, 9, batch_first=True), nn.Linear(9, 2)

    def forward(self, x):
        return self.head(self.cell(torch.relu(self.embed(x)))[0].mean(1))
"""


def exported(path: Path, seed: int, batch: int = 1) -> Path:
    torch.manual_seed(seed)
    torch.export.save(torch.export.export(Net().eval(), (torch.randn(batch, 6, 5),)), path)
    return path


def run(*arguments: str):
    return CliRunner().invoke(build_app(default_manager()), list(arguments))


def outputs(path: Path, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.export.load(path).module()(inputs)


@pytest.mark.parametrize("batch", [1, 2])
def test_it_is_checked_without_an_architecture(tmp_path: Path, batch: int) -> None:
    path = exported(tmp_path / "a.pt2", 0, batch)
    done = run("check", str(path), "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["groups"], found["certified"], found["preserved"]) == (2, 2, True)


def test_it_gives_the_groups_of_the_module_that_was_exported(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(exported(tmp_path / "a.pt2", 0))
    ours = check_model(checkpoint.build, checkpoint.example_inputs).graph
    theirs = check_model(Net, torch.randn(2, 6, 5)).graph
    assert sorted(ours.free_groups) == sorted(theirs.free_groups)
    assert list(checkpoint.state) == [name for name, _ in Net().named_parameters()]


def test_two_are_fused_into_one_that_runs(tmp_path: Path) -> None:
    one, other, inputs = exported(tmp_path / "a.pt2", 0), exported(tmp_path / "b.pt2", 1), torch.randn(1, 6, 5)
    done = run("fuse", str(one), str(other), "-o", str(tmp_path / "f.pt2"), "--solver", "weight-matching", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["aligned_sources_max_error"] < 1e-5
    assert outputs(tmp_path / "f.pt2", inputs).shape == (1, 2)
    assert not torch.allclose(outputs(tmp_path / "f.pt2", inputs), outputs(one, inputs))
    # The inputs are as they were.
    assert torch.equal(torch.export.load(one).state_dict["embed.weight"], load_checkpoint(one).state["embed.weight"])


def test_an_aligned_program_computes_what_the_program_computes(tmp_path: Path) -> None:
    one, other, inputs = exported(tmp_path / "a.pt2", 0), exported(tmp_path / "b.pt2", 1), torch.randn(1, 6, 5)
    done = run("align", str(one), str(other), "-o", str(tmp_path / "aligned"))
    assert done.exit_code == 0, done.output
    aligned = tmp_path / "aligned" / "b.pt2"
    assert torch.allclose(outputs(aligned, inputs), outputs(other, inputs), atol=1e-6)
    state, before = torch.export.load(aligned).state_dict, torch.export.load(other).state_dict
    assert not torch.equal(state["embed.weight"], before["embed.weight"])


def test_it_fuses_with_a_module_of_the_same_parameters(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(exported(tmp_path / "a.pt2", 0))
    program = SourceModel("program", checkpoint.build, checkpoint.state)
    model = Net()
    result = fuse([program, model], solver="wb", example_inputs=checkpoint.example_inputs, model_weights=[0, 1])
    assert all(
        torch.equal(value.sort(0).values, model.state_dict()[name].sort(0).values)
        for name, value in result.state.items()
        if value.ndim == 1
    )


def test_a_state_without_a_program_is_not_written_as_one(tmp_path: Path) -> None:
    for number in (0, 1):
        torch.save(Net().state_dict(), tmp_path / f"{number}.pt")
    (tmp_path / "net.py").write_text(SOURCE, encoding="utf-8")
    target = tmp_path / "f.pt2"
    models = [str(tmp_path / f"{number}.pt") for number in (0, 1)]
    arch = f"{tmp_path / 'net.py'}:Net"
    with pytest.raises(CheckpointError, match="holds a program"):
        CliRunner().invoke(
            build_app(default_manager()),
            ["fuse", *models, "-o", str(target), "--arch", arch, "--input-shape", "6,5"],
            catch_exceptions=False,
        )
    assert not target.exists()


def test_a_truncated_program_is_refused(tmp_path: Path) -> None:
    path = exported(tmp_path / "a.pt2", 0)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(CheckpointError, match="truncated"):
        load_checkpoint(path)


class Trap:
    """What a pickle of this would run when it is loaded."""

    def __reduce__(self):
        return eval, ("open('executed', 'w').close()",)


@pytest.mark.parametrize("member", ["sample_inputs", "constants"])
def test_code_in_a_program_is_not_executed(tmp_path: Path, member: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = exported(tmp_path / "a.pt2", 0)
    stream = io.BytesIO()
    torch.save({"inputs": Trap()}, stream)
    changed = tmp_path / "trap.pt2"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(changed, "w") as target:
        names = source.namelist()
        for name in names:
            target.writestr(name, source.read(name))
        target.writestr(f"{names[0].split('/')[0]}/data/{member}/trap.pt", stream.getvalue())
    with pytest.raises(CheckpointError, match="carries code"):
        load_checkpoint(changed)
    assert not (tmp_path / "executed").exists()
