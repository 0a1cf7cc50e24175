"""Commands on a language model: perplexity beside the loss, and calibration counted in tokens."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import commands
from torch import Tensor, nn

from mergekit_ot import evaluate, load_checkpoint
from mergekit_ot.cli.app import main
from mergekit_ot.scoring.tally import Evaluation

_FILES = {
    "nets.py": """
import torch
from torch import nn

class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(7, 5), nn.Linear(5, 6), nn.Linear(6, 7)

    def forward(self, tokens):
        return self.head(torch.tanh(self.hidden(self.embedding(tokens).cumsum(1))))
""",
    "data.py": """
import torch

def text(split="test"):
    tokens = torch.randint(7, (30, 9), generator=torch.Generator().manual_seed(len(split)))
    return [(part[:, :-1], part[:, 1:]) for part in tokens.split(10)]
""",
}
_ON = ("--arch", "nets.py:Language", "--data", "data.py:text")
Command = Callable[..., str]


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Gives a way to run commands in a folder with two language models and text; returns what they print."""
    monkeypatch.chdir(tmp_path)
    for name, content in _FILES.items():
        Path(name).write_text(content, encoding="utf-8")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        layers = {"embedding": nn.Embedding(7, 5), "hidden": nn.Linear(5, 6), "head": nn.Linear(6, 7)}
        torch.save(nn.ModuleDict(layers).state_dict(), f"{name}.pt")

    return commands(capsys)


def test_the_perplexity_is_the_exponential_of_the_mean_cross_entropy() -> None:
    tokens = torch.randint(5, (4, 3), generator=torch.Generator().manual_seed(0))
    even = nn.Embedding.from_pretrained(torch.zeros(5, 5))
    sure = nn.Embedding.from_pretrained(torch.eye(5) * 50)
    for net, perplexity in ((even, 5.0), (sure, 1.0)):
        score = evaluate(net, [(tokens, tokens)])
        assert score.perplexity == pytest.approx(perplexity)
        assert score.as_json()["perplexity"] == score.perplexity


@pytest.mark.parametrize(
    "targets",
    [torch.zeros(4).long(), torch.zeros(4, 3), torch.zeros(4, 3, 3).long()],
    ids=["a class per sample", "numbers", "a class per pixel"],
)
def test_what_is_no_token_has_no_perplexity(targets: Tensor) -> None:
    outputs = torch.zeros(*targets.shape, 2) if not targets.is_floating_point() else torch.zeros_like(targets)
    score = evaluate(nn.Identity(), [(outputs, targets)])
    assert score.perplexity is None
    assert set(score.as_json()) == {"loss", "accuracy", "count"}


@pytest.mark.parametrize(("loss", "perplexity"), [(1e4, math.inf), (math.inf, math.inf), (0.0, 1.0)])
def test_a_huge_loss_has_an_infinite_perplexity(loss: float, perplexity: float) -> None:
    assert Evaluation(loss, None, 1, is_of_tokens=True).perplexity == perplexity
    assert math.isnan(Evaluation(math.nan, None, 1, is_of_tokens=True).perplexity or 0)


def test_eval_prints_the_perplexity(command: Command) -> None:
    scores = json.loads(command("eval", "a.pt", "b.pt", *_ON, "--json"))["models"]
    assert [score["perplexity"] for score in scores] == pytest.approx([math.exp(score["loss"]) for score in scores])
    assert {score["count"] for score in scores} == {240}
    table = command("eval", "a.pt", "b.pt", *_ON)
    assert "perplexity" in table
    assert f"{scores[0]['perplexity']:.4g}" in table


def test_barrier_prints_the_perplexity_at_every_point(command: Command) -> None:
    arguments = ("barrier", "a.pt", "b.pt", *_ON, "--points", "3", "--align", "weight-matching")
    curve = json.loads(command(*arguments, "--json"))
    for each in (curve, curve["aligned"]):
        assert each["perplexity"] == pytest.approx([math.exp(loss) for loss in each["loss"]])
    table = command(*arguments)
    assert "Loss, accuracy and perplexity on the path" in table
    assert f"{curve['perplexity'][1]:.4g}" in table


def test_a_report_has_the_perplexity(command: Command) -> None:
    command("fuse", "a.pt", "b.pt", *_ON, "-o", "fused.pt", "--report", "report")
    scores = json.loads(Path("report/report.json").read_text(encoding="utf-8"))["scores"]
    assert [score["perplexity"] for score in scores] == pytest.approx([math.exp(score["loss"]) for score in scores])
    for page in ("report.md", "report.html"):
        text = Path("report", page).read_text(encoding="utf-8")
        assert "perplexity" in text
        assert f"{scores[0]['perplexity']:.4g}" in text


def test_calibration_is_counted_in_tokens_where_that_is_asked_for(command: Command) -> None:
    fused = ("fuse", "a.pt", "b.pt", *_ON, "--solver", "activation-matching")
    for arguments, sequences in ((("--calibration-tokens", "100"), 12), (("--calibration-size", "5"), 5), ((), 30)):
        said = command(*fused, "-o", f"{sequences}.pt", *arguments)
        assert f"Calibrated on {sequences} sequences of 8 tokens, {sequences * 8} tokens in all" in said
    Path("r.yaml").write_text("calibration_tokens: 100\n", encoding="utf-8")
    command(*fused, "-o", "again.pt", "--recipe", "r.yaml")
    one, other = (load_checkpoint(name).state for name in ("12.pt", "again.pt"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_help_says_what_is_counted(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fuse", "--help"])
    shown = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert "of a language model, whole sequences" in shown
    assert "as many sequences of --data as hold at most N tokens" in shown
