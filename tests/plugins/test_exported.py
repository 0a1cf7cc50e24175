"""Exported programs that the user trusts as sources: no architecture is named."""

from __future__ import annotations

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
    done = run("check", str(path), "--trust", str(path), "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["groups"], found["certified"], found["preserved"]) == (2, 2, True)


def test_it_gives_the_groups_of_the_module_that_was_exported(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(exported(tmp_path / "a.pt2", 0), trust=True)
    ours = check_model(checkpoint.build, checkpoint.example_inputs).graph
    theirs = check_model(Net, torch.randn(2, 6, 5)).graph
    assert sorted(ours.free_groups) == sorted(theirs.free_groups)
    assert list(checkpoint.state) == [name for name, _ in Net().named_parameters()]


def test_two_are_fused_into_one_that_runs(tmp_path: Path) -> None:
    one, other, inputs = exported(tmp_path / "a.pt2", 0), exported(tmp_path / "b.pt2", 1), torch.randn(1, 6, 5)
    options = ["--solver", "weight-matching", "--trust", str(one), "--trust", str(other)]
    done = run("fuse", str(one), str(other), "-o", str(tmp_path / "f.pt2"), "--json", *options)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["aligned_sources_max_error"] < 1e-5
    assert outputs(tmp_path / "f.pt2", inputs).shape == (1, 2)
    assert not torch.allclose(outputs(tmp_path / "f.pt2", inputs), outputs(one, inputs))
    # The inputs are as they were.
    assert torch.equal(
        torch.export.load(one).state_dict["embed.weight"], load_checkpoint(one, trust=True).state["embed.weight"]
    )


def test_an_aligned_program_computes_what_the_program_computes(tmp_path: Path) -> None:
    one, other, inputs = exported(tmp_path / "a.pt2", 0), exported(tmp_path / "b.pt2", 1), torch.randn(1, 6, 5)
    done = run(
        "align", str(one), str(other), "-o", str(tmp_path / "aligned"), "--trust", str(one), "--trust", str(other)
    )
    assert done.exit_code == 0, done.output
    aligned = tmp_path / "aligned" / "b.pt2"
    assert torch.allclose(outputs(aligned, inputs), outputs(other, inputs), atol=1e-6)
    state, before = torch.export.load(aligned).state_dict, torch.export.load(other).state_dict
    assert not torch.equal(state["embed.weight"], before["embed.weight"])


def test_it_fuses_with_a_module_of_the_same_parameters(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(exported(tmp_path / "a.pt2", 0), trust=True)
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
        load_checkpoint(path, trust=True)


def test_what_is_written_names_no_folder(tmp_path: Path) -> None:
    """A program keeps where its operations stood in the source code, with the folders of whoever exported it."""
    one, other = exported(tmp_path / "a.pt2", 0), exported(tmp_path / "b.pt2", 1)
    assert any(str(Path(__file__).parent).encode() in content for content in members(one).values())
    done = run("fuse", str(one), str(other), "-o", str(tmp_path / "f.pt2"), "--trust", str(one), "--trust", str(other))
    assert done.exit_code == 0, done.output
    written = members(tmp_path / "f.pt2")
    assert {name.split("/")[0] for name in written} == {"archive"}
    for name, content in written.items():
        assert str(Path(__file__).parent).encode() not in content, name
        assert str(tmp_path).encode() not in content, name
    assert b"test_exported.py" in written["archive/models/model.json"]


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}
