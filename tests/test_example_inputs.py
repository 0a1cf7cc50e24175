"""Inputs to trace by, as the command line finds them: further inputs are guessed and told, tables of bags are seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergekit_ot.cli.app import main

NETS = """
import torch
from torch import nn

class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.time, self.last = nn.Conv2d(1, 8, 3), nn.Linear(1, 8), nn.Conv2d(8, 1, 3)

    def forward(self, image, step):
        hidden = self.first(image) + self.time(step[:, None].float())[:, :, None, None]
        return self.last(torch.relu(hidden))

class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.last = nn.EmbeddingBag(20, 8), nn.Linear(8, 3)

    def forward(self, tokens):
        return self.last(torch.relu(self.table(tokens)))

class Placed(nn.Module):
    def __init__(self, hidden=8):
        super().__init__()
        self.first, self.places, self.last = nn.Linear(4, hidden), nn.Embedding(10, hidden), nn.Linear(hidden, 2)
        self.middle = nn.Linear(hidden, hidden)

    def forward(self, values):
        places = torch.arange(values.shape[1], device=values.device)
        return self.last(torch.relu(self.middle(self.first(values) + self.places(places))))

class Conditioned(Placed):
    def forward(self, values, condition):
        return self.last(torch.relu(self.first(values) + self.places(condition)))

def placed_large():
    return Placed(1100)

class Mixed(Placed):
    def forward(self, values):
        with torch.autocast(values.device.type, dtype=torch.bfloat16):
            return super().forward(values)

class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.LazyLinear(8), nn.LazyLinear(2)

    def forward(self, values):
        return self.last(torch.relu(self.first(values)))

class Named(nn.Linear):
    def forward(self, values, table):
        return super().forward(values) * table["scale"]

def named():
    return Named(4, 2)
"""


def check(folder: Path, name: str, *arguments: str) -> int:
    (folder / "nets.py").write_text(NETS)
    known: dict[str, object] = {}
    exec(NETS, known)
    net = known[name]()  # type: ignore[operator]
    if name == "Lazy":
        net(torch.zeros(1, 4))
    torch.save(net.state_dict(), folder / "net.pt")
    with pytest.raises(SystemExit) as ended:
        main(["check", str(folder / "net.pt"), "--arch", f"{folder / 'nets.py'}:{name}", *arguments])
    return int(ended.value.code or 0)


def test_a_second_input_is_guessed_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path, "Noise", "--input-shape", "1,8,8") == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "Input 'step' of" in told
    assert "was guessed: numbers, one each. If it is wrong, pass --data SPEC" in told


def test_an_input_that_cannot_be_guessed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path, "named", "--input-shape", "4") == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "takes inputs besides the one that --input-shape 4 describes (table)" in told
    assert "Pass --data SPEC, whose batches are ((first, table), targets)." in told


def test_a_table_of_bags_gives_its_tokens_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path, "Bag") == 0
    assert "16 (token numbers) is the first plausible one" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("name", "shape"),
    [("Placed", "6,4"), ("placed_large", "6,4"), ("Conditioned", "4"), ("Mixed", "6,4"), ("Lazy", "4")],
)
def test_numbers_are_tried_where_a_table_stands_beside_a_layer(
    name: str, shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(tmp_path, name, "--input-shape", shape) == 0
    assert "the function stays" in " ".join(capsys.readouterr().err.split())
