"""What a terminal shows: tables that fold, time left, help in groups, completion, options of methods."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
import typer
from commands import commands

from mergekit_ot import default_manager
from mergekit_ot.cli import tables, terminal
from mergekit_ot.cli.app import build_app

ROWS = [{"name": "layers.0.attention.query", "size": 768, "cost": 0.123456, "status": "converged", "why": None}]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_a_table_is_no_wider_than_the_lines(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    tables.show_table(ROWS, title="Neuron groups")
    printed = capsys.readouterr().err
    assert max(map(len, printed.splitlines())) <= width
    joined = "".join(printed.split())
    for cell in ("layers.0.attention.query", "768", "0.1235", "–"):
        assert cell in joined
    assert ("status: converged" in printed) == (width < 60)


class Terminal(io.StringIO):
    """Standard error that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, *steps: tuple[float, int]) -> str:
    """Returns what is written while steps of ten are done at given seconds."""
    seconds = iter([0.0, *(moment for moment, _ in steps)])
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delenv("TERM", raising=False)
    with terminal.StepLine(lambda: next(seconds), beats=False) as line:
        for _, done in steps:
            line(done, 10, "groups\x1b[2J")
        terminal.note("a note")
    return stream.getvalue()


def test_time_left_is_shown_on_a_terminal_and_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    written = shown(monkeypatch, Terminal(), (0.0, 0), (1.0, 1), (20.0, 5))
    assert "20 s, step 5/10, about 20 s left  groups\\x1b[2J" in written
    assert "step 1/10" not in written
    assert written.endswith("\r\x1b[2Ka note\n")


def test_a_log_has_few_lines_and_nothing_of_quick_work(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [(float(second), min(second // 10, 9)) for second in range(95)]
    lines = shown(monkeypatch, io.StringIO(), *steps).splitlines()
    assert [line.split(":")[0] for line in lines] == ["After 10 s", "After 20 s", "After 40 s", "After 80 s", "a note"]
    assert "about 60 s left" in lines[2]
    assert shown(monkeypatch, io.StringIO(), (0.0, 0), (3.0, 5)) == "a note\n"


def test_every_command_stands_in_a_group_and_has_an_example() -> None:
    app = build_app(default_manager())
    program = typer.main.get_command(app)
    for name, command in program.commands.items():  # type: ignore[attr-defined]
        assert isinstance(command.rich_help_panel, str), name
        assert f"mergeot {name}" in (command.epilog or ""), name
    for name in ("fuse", "align", "check", "inspect", "eval", "barrier", "plugins", "docs", "cache"):
        assert f"mergeot {name} " in (program.epilog or "")


def test_a_shell_completes_solvers() -> None:
    asked = {"_MERGEOT_COMPLETE": "complete_bash", "COMP_WORDS": "mergeot fuse --solver weight", "COMP_CWORD": "3"}
    code = "from mergekit_ot.cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True)
    assert done.stdout.split() == ["weight-matching"]


def test_options_of_methods_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    listed = json.loads(commands(capsys)("plugins", "--options", "--json"))["options"]
    assert set(listed) == {"solvers", "repairs"}
    assert set(listed["solvers"]) == set(default_manager().solvers)
    steps = next(each for each in listed["solvers"]["weight-matching"] if each["option"] == "max_steps")
    assert steps["value"] == "a whole number, at least 1, at most 1000000"
    assert isinstance(steps["default"], int)
