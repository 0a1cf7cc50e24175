"""Who follows the tutorial docs/tutorials/fuse-two-gpts.md sees what it shows; a default run trains less."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mergekit_ot.cli.app import main

PAGE = Path(__file__).parent.parent / "docs" / "tutorials" / "fuse-two-gpts.md"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Trained numbers and seconds differ from machine to machine; whole numbers (sizes, counts) do not.
_MEASURED = re.compile(r"[-+]?\d+(\.\d+)?e[-+]\d+|[-+]?\d+\.\d+|\b(?<=barrier )\d+")
_OMITTED = "…"
# So few steps that training takes seconds; commands of which one of a kind is enough for a default run.
_FEW_STEPS = "20"
_FAST = ("check", "fuse")


def blocks(language: str) -> list[str]:
    return [text for kind, text in _BLOCK.findall(PAGE.read_text(encoding="utf-8")) if kind == language]


def commands() -> list[tuple[list[str], str]]:
    """Returns every command of the page, and what is shown below it."""
    several = [part for block in blocks("console") for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    return [(shlex.split(command), shown) for command, _, shown in (part.partition("\n") for part in several)]


def comparable(text: str) -> list[str]:
    """Returns lines without their spacing and measured numbers; empty and omitted ones are left out."""
    plain = (" ".join(_MEASURED.sub("#", line).replace("─", "").split()) for line in text.splitlines())
    return [line for line in plain if line not in ("", _OMITTED)]


class Reader:
    """Follows the page in an empty folder."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capsys = capsys
        monkeypatch.chdir(folder)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setenv("MERGEOT_CACHE", str(folder / "cache"))
        Path("gpt.py").write_text(blocks("python")[0], encoding="utf-8")

    def types(self, words: list[str]) -> str:
        """Returns what a command prints."""
        program, *arguments = words
        if program == "python":
            subprocess.run([sys.executable, *arguments], check=True)
        if program != "mergeot":
            return ""
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        printed = self.capsys.readouterr()
        assert not stopped.value.code, printed.err
        return printed.err + printed.out


@pytest.fixture
def reader(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Reader:
    return Reader(tmp_path, capsys, monkeypatch)


def check_shown(words: list[str], printed: str, shown: str) -> None:
    """Asserts that the lines below a command on the page are printed, in their order."""
    lines, command = comparable(printed), " ".join(words)
    places = []
    for line in comparable(shown):
        assert line in lines, f"'{command}' does not print '{line}', but {lines}"
        places.append(lines.index(line))
    assert places == sorted(places), f"'{command}' prints the lines of the page in another order"


@pytest.mark.slow
def test_what_the_page_shows_is_printed(reader: Reader) -> None:
    left = dict.fromkeys(_FAST, 1)
    for words, shown in commands():
        if words[0] == "python":
            reader.types([*words[:-1], _FEW_STEPS])
        elif words[0] == "mergeot" and left.get(words[1], 0):
            left[words[1]] -= 1
            check_shown(words, reader.types(words), shown)
    assert not any(left.values())


def perplexities(printed: str) -> dict[str, float]:
    rows = re.findall(r"^ (\S+\.pt) .* ([\d.]+) +\d+ *$", printed, re.MULTILINE)
    return {path: float(perplexity) for path, perplexity in rows}


@pytest.mark.slow
def test_who_follows_the_page_sees_what_it_shows(reader: Reader) -> None:
    printed = {}
    for words, shown in commands():
        printed[words[1]] = reader.types(words)
        check_shown(words, printed[words[1]], shown)
    (evaluated,) = [words for words, _ in commands() if words[:2] == ["mergeot", "eval"]]
    worth = perplexities(printed["eval"])
    assert set(worth) == {word for word in evaluated if word.endswith(".pt")}
    parents = (worth["gpt-0.pt"] + worth["gpt-1.pt"]) / 2
    # Orders leave the parents far apart; rotations bring them nearer; refit brings them home.
    assert worth["wb.pt"] > 1.3 * parents
    assert worth["rotated.pt"] < worth["wb.pt"]
    assert worth["refit.pt"] < 1.15 * parents
