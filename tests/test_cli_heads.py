"""Heads and kept layers on the command line: flags, what is said, and files that load where they say they do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from mergekit_ot.api import load_checkpoint, save_checkpoint
from mergekit_ot.cli.app import main
from mergekit_ot.sources.specs import resolve_architecture

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in a folder with a.pt (3 classes) and b.pt (5), which carry their architectures."""
    monkeypatch.chdir(tmp_path)
    for name, classes in (("a.pt", 3), ("b.pt", 5)):
        torch.manual_seed(classes)
        sizes = {"sizes": f"4-6-{classes}"}
        save_checkpoint(network(classes), name, architecture="mlp", arguments=sizes, input_shape=(4,))

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, " ".join(said.err.split())

    return call


def network(classes: int) -> nn.Module:
    return resolve_architecture(f"mlp?sizes=4-6-{classes}")()


def test_a_head_is_kept(run: Run) -> None:
    status, _, said = run("fuse", "a.pt", "b.pt", "--keep", "fc2.*")
    assert status == 0
    assert "Kept from 'a.pt' as they are: 2 parameters ('fc2.weight', 'fc2.bias')" in said
    state, first = load_checkpoint("fused.pt").state, load_checkpoint("a.pt").state
    assert all(torch.equal(state[name], first[name]) for name in ("fc2.weight", "fc2.bias"))


def test_a_head_is_kept_from_another_model_by_its_name(run: Run) -> None:
    status, _, said = run("fuse", "a.pt", "b.pt", "--keep", "fc2.*=b.pt")
    assert (status, "--target 1" in said, Path("fused.pt").exists()) == (1, True, False)
    assert run("fuse", "a.pt", "b.pt", "--keep", "fc2.*=b.pt", "--target", "1")[0] == 0
    assert load_checkpoint("fused.pt").state["fc2.weight"].shape == (5, 6)


def test_the_heads_of_all_are_in_a_file_that_needs_no_architecture(run: Run) -> None:
    status, _, said = run("fuse", "a.pt", "b.pt", "--head", "both")
    assert (status, "3 to 7 are those of 'b.pt'" in said) == (0, True)
    checkpoint = load_checkpoint("fused.pt")
    assert (checkpoint.architecture, checkpoint.arguments) == ("mlp", {"sizes": "4-6-8"})
    network(8).load_state_dict(dict(checkpoint.state))


def test_what_differs_is_told_in_one_message(run: Run) -> None:
    status, out, said = run("fuse", "a.pt", "b.pt")
    assert (status, out) == (1, "")
    assert "The heads have 3 and 5 classes (outputs) in a.pt and b.pt ('fc2.weight', axis 0)" in said
    assert "--keep 'fc2.*'" in said
    status, _, said = run("fuse", "a.pt", "b.pt", "--keep", "fc3.*")
    assert (status, "No parameter matches 'fc3.*'" in said) == (1, True)


def test_counts_of_samples_are_model_weights(run: Run) -> None:
    command = ("fuse", "a.pt", "b.pt", "--keep", "fc2.*", "--model-weights", "100,300")
    status, out, _ = run(*command, "--json")
    assert (status, json.loads(out)["aligned_groups"]) == (0, 1)
    _, _, said = run(*command)
    assert "sum to 400 and were divided by it: 0.25, 0.75" in said
    weights = [source["weight"] for source in load_checkpoint("fused.pt").provenance["sources"]]
    assert weights == [0.25, 0.75]


def test_rules_for_layers_stand_in_a_recipe(run: Run) -> None:
    Path("fuse.yaml").write_text(
        "models: [a.pt, b.pt]\nkeep: fc2.*\nlayers:\n- parameters: fc1.*\n  weights: [0, 2]\nsolver: average\n"
    )
    assert run("fuse", "--recipe", "fuse.yaml")[0] == 0
    state, second = load_checkpoint("fused.pt").state, load_checkpoint("b.pt").state
    assert torch.equal(state["fc1.weight"], second["fc1.weight"])
