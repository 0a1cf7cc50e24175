"""Sources of different depth on the command line: what is chosen and said, and files that load as the deeper one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import commands
from depth_nets import ROWS, filled, perceptron

from mergekit_ot.api import load_checkpoint

NETS = "from depth_nets import perceptron\n\ndef net(depth=2):\n    return perceptron(depth)\n"
DEPTHS = ("--arch", "nets.py:net?depth=2", "--arch", "nets.py:net?depth=4")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command in a folder with a.pt (two blocks) and b.pt (four)."""
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS, encoding="utf-8")
    for name, depth in (("a.pt", 2), ("b.pt", 4)):
        torch.save(filled(perceptron(depth), depth).state_dict(), name)
    return commands(capsys)


def test_the_deepest_is_chosen_and_it_is_said(run: Callable[..., str]) -> None:
    said = " ".join(run("fuse", "a.pt", "b.pt", *DEPTHS, "--input-shape", "5").split())
    assert "the fused network is as deep as the deepest, and has the sizes of 'b.pt'" in said
    assert "'a.pt' was deepened to the 4 blocks of 'b.pt': 2 that compute nothing were added" in said
    model = perceptron(4)
    model.load_state_dict(dict(load_checkpoint("fused.pt").state))
    assert bool(model(ROWS).isfinite().all())
    # With the weight of the first alone, the file holds the first, in the other's form.
    run("fuse", "a.pt", "b.pt", *DEPTHS, "--input-shape", "5", "--model-weights", "1,0", "--target", "1")
    model.load_state_dict(dict(load_checkpoint("fused.pt").state))
    assert torch.allclose(model.eval()(ROWS), filled(perceptron(2), 2)(ROWS), atol=1e-5)


def test_json_says_which_blocks_were_matched(run: Callable[..., str]) -> None:
    (told,) = json.loads(run("fuse", "a.pt", "b.pt", *DEPTHS, "--input-shape", "5", "--json"))["deepened"]
    assert (told["source"], told["like"], told["inserted"], told["seen_by"]) == ("a.pt", "b.pt", 2, "weights")
    assert list(told["blocks"]) == ["1", "2", "3", "4"]
    assert [own for own in told["blocks"].values() if own] == ["1", "2"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fuse", *DEPTHS, "--target", "nets.py:net?depth=3"), "has fewer blocks than 'b.pt'"),
        (("align", *DEPTHS, "-o", "aligned"), "differ in depth"),
    ],
    ids=["a target of fewer blocks", "align"],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    run: Callable[..., str], arguments: tuple[str, ...], said: str
) -> None:
    command, *flags = arguments
    shape = ("--input-shape", "5")
    assert said in " ".join(run(command, "a.pt", "b.pt", *flags, *shape, status=1).split())
    assert sorted(path.name for path in Path().glob("*.pt")) == ["a.pt", "b.pt"]
