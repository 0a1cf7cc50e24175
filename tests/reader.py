"""Follows a page of the documentation: saves its files, runs its Python, types its commands, compares what is shown."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mergekit_ot.cli.app import main

_BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Trained numbers and seconds differ from machine to machine; whole numbers (sizes, counts) do not.
_MEASURED = re.compile(r"[-+]?\d+(\.\d+)?e[-+]\d+|[-+]?\d+\.\d+|\b(?<=barrier )\d+")


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Returns language, title and text of every block of a page."""
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


def comparable(text: str) -> list[str]:
    """Returns lines without their spacing and measured numbers; empty ones are left out."""
    plain = (" ".join(_MEASURED.sub("#", line).replace("─", "").split()) for line in text.splitlines())
    return [line for line in plain if line]


def assert_shown(done: str, printed: str, shown: str) -> None:
    """Asserts that the lines that a page shows are printed, in their order."""
    lines = comparable(printed)
    places = []
    for line in comparable(shown):
        assert line in lines, f"'{done}' does not print '{line}', but {lines}"
        places.append(lines.index(line))
    assert places == sorted(places), f"'{done}' prints the lines of the page in another order"


class Reader:
    """Follows a page in an empty folder.

    Attributes:
        names: What the Python of the page has defined so far.
        printed: Everything that was printed.
    """

    def __init__(self, page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.page = page
        self.names: dict[str, Any] = {"__name__": "__page__"}
        self.printed = ""
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setenv("MERGEOT_CACHE", str(folder / "cache"))

    def follow(self) -> None:
        """Does all that the page says, and asserts that it shows what is printed."""
        stems = {Path(title).stem for _, title, _ in blocks(self.page) if title.endswith(".py")}
        hidden = {stem: sys.modules.pop(stem) for stem in stems if stem in sys.modules}
        try:
            self._follow()
        finally:
            for stem in stems:
                sys.modules.pop(stem, None)
            sys.modules.update(hidden)

    def _follow(self) -> None:
        done, printed = "", ""
        for language, title, text in blocks(self.page):
            if title:
                Path(title).write_text(text, encoding="utf-8")
            elif language == "python":
                done, printed = text, self._run(text)
            elif language == "text":
                assert_shown(done, printed, text)
            elif language == "console":
                for command, shown in commands_of(text):
                    assert_shown(command, self._type(command), shown)

    def _run(self, code: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, self.page.name, "exec"), self.names)
        self.printed += printed.getvalue()
        return printed.getvalue()

    def _type(self, command: str) -> str:
        program, *arguments = shlex.split(command)
        assert program == "mergeot", command
        errors, output = io.StringIO(), io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output), pytest.raises(SystemExit) as ended:
            main(arguments)
        assert not ended.value.code, f"{command}\n{errors.getvalue()}"
        self.printed += errors.getvalue() + output.getvalue()
        return errors.getvalue() + output.getvalue()


def commands_of(text: str) -> Iterator[tuple[str, str]]:
    """Yields each command of a console block, and what is shown below it."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        yield command, shown
