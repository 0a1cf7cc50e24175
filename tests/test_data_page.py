"""The page on data: its commands run, on data of every kind that it names."""

from __future__ import annotations

import csv
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import commands
from PIL import Image
from torch import nn

PAGE = (Path(__file__).parent.parent / "docs" / "how-to" / "data.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ mergeot (.+)$", PAGE, flags=re.MULTILINE)

NETS = """
import torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

def cnn():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 2))

class Chars(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.cell, self.last = nn.Embedding(15, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 15)

    def forward(self, tokens):
        return self.last(self.cell(self.table(tokens))[0])

def chars():
    return Chars()

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.hidden, self.last = nn.Embedding(15, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, tokens):
        return self.last(torch.relu(self.hidden(self.table(tokens).mean(1))))

def words():
    return Words()

class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.time, self.first, self.last = nn.Embedding(1000, 8), nn.Conv2d(1, 8, 3), nn.Conv2d(8, 1, 3)

    def forward(self, x, t):
        return self.last(torch.relu(self.first(x) + self.time(t)[:, :, None, None]))
"""

Run = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with networks and data of every kind."""
    place = tmp_path_factory.mktemp("data")
    (place / "nets.py").write_text(NETS)
    known: dict[str, Callable[[], nn.Module]] = {}
    exec(NETS, known)
    for name in ("mlp", "cnn", "chars", "words", "Noise"):
        for seed in (0, 1):
            torch.manual_seed(seed)
            torch.save(known[name]().state_dict(), place / f"{name.lower()}_{seed}.pt")
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(size=(30, 4)).astype(np.float32), rng.integers(0, 3, 30)
    np.savez(place / "numbers.npz", x=inputs, y=targets)
    np.save(place / "x.npy", inputs)
    np.save(place / "y.npy", targets)
    with open(place / "numbers.csv", "w", newline="") as file:
        csv.writer(file).writerows([["a", "b", "c", "d", "label"], *np.column_stack([inputs, targets]).tolist()])
    lines = (place / "numbers.csv").read_text().replace(".0\n", "\n").replace(".0\r", "\r")
    (place / "numbers.csv").write_text(lines)
    for name, folders in (("photos", ("cat", "dog")), ("flat", ("",))):
        for number, each in enumerate(folders):
            (place / name / each).mkdir(parents=True)
            for index in range(12):
                pixels = rng.integers(0, 255, (16 + 2 * number, 18, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / name / each / f"{index}.png")
    (place / "chars.txt").write_text(" abefhinoqrstu\n")
    (place / "text.txt").write_text("to be or not to be that is the question\n" * 20)
    rows = [f"{'to be ' * (1 + place % 3)}on,{'good' if place % 2 else 'bad'}" for place in range(12)]
    (place / "reviews.csv").write_text("\n".join(["text,label", *rows]))
    (place / "batches.py").write_text(re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)[0])
    return place


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(folder)
    return commands(capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_works(command: str, run: Run) -> None:
    said = run(*shlex.split(command))
    assert "warning" not in said.replace("warnings", "")


def test_the_page_has_a_command_for_every_kind() -> None:
    assert len(COMMANDS) >= 10
    for kind in (".npz", ".npy", "photos", "flat", ".txt", ".csv", "batches.py", "--input", "--metric", "--top"):
        assert any(kind in command for command in COMMANDS), kind


@pytest.mark.slow
def test_a_folder_of_datasets_is_read_part_by_part(folder: Path, run: Run) -> None:
    datasets = pytest.importorskip("datasets")
    images = [Image.open(path) for path in sorted((folder / "photos" / "cat").glob("*.png"))]
    table = datasets.Dataset.from_dict(
        {"image": images, "label": [0, 1] * 6},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}),
    )
    datasets.DatasetDict({"train": table, "test": table.select(range(8))}).save_to_disk(str(folder / "saved"))
    assert " 8 " in run("eval", "cnn_0.pt", "--arch", "nets.py:cnn", "--data", "saved?size=16")
    texts = datasets.Dataset.from_dict({"text": ["to be", "or not", "to be"], "label": [0, 1, 1]})
    texts.save_to_disk(str(folder / "texts"))
    said = run("eval", "words_0.pt", "--arch", "nets.py:words", "--data", "texts?vocabulary=chars.txt")
    assert " 3 " in said
