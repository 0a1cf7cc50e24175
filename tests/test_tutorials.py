"""Who follows a tutorial, or a page with Python, in an empty folder sees what it shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from reader import Reader

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Returns what follows a page, and gives the percentages that it printed by the word before them."""

    def follow(name: str) -> dict[str, float]:
        reader = Reader(DOCS / f"{name}.md", tmp_path, monkeypatch)
        reader.follow()
        shown = re.findall(r"^([\w-]+) ([\d.]+) %", reader.printed, re.MULTILINE)
        return {word: float(number) for word, number in shown}

    return follow


def test_first_two_networks(follow) -> None:
    accuracy = follow("tutorials/first-two-networks")
    assert accuracy["sources"] > 85
    assert accuracy["mean"] < accuracy["sources"] - 20
    assert accuracy["fused"] > accuracy["sources"] - 6
    assert accuracy["refitted"] > accuracy["sources"] - 3


@pytest.mark.parametrize("page", ["tutorials/own-architecture", "how-to/widths", "how-to/executors"])
def test_what_a_page_shows_is_printed(follow, page: str) -> None:
    follow(page)


@pytest.mark.slow
def test_resnets(follow) -> None:
    accuracy = follow("tutorials/resnets")
    assert accuracy["sources"] > 90
    assert accuracy["weight-matching"] < accuracy["reset"] - 30
    assert accuracy["refit"] > max(accuracy["reset"] + 2, accuracy["sources"] - 4)


@pytest.mark.slow
def test_recurrent(follow) -> None:
    accuracy = follow("tutorials/recurrent")
    assert accuracy["sources"] > 80
    assert accuracy["gwb"] > accuracy["average"] + 10
    assert accuracy["refit"] > accuracy["sources"] - 4
