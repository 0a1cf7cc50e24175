"""Hostile input: every kind ends in one message that names the file and the key, and leaves nothing behind."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import torch
from hostile import CASES
from hostile.case import Case, linear, write_good

from mergekit_ot import load_checkpoint
from mergekit_ot.cli.app import main
from mergekit_ot.errors import CheckpointError, RecipeError
from mergekit_ot.storage.limits import ALL

_MOST_SECONDS = 10
_MOST_KIB = 700 << 10  # a process that has loaded torch has 300 MiB already
_STATUS = Path("/proc/self/status")


def test_there_are_many_kinds():
    assert len({case.name for case in CASES}) == len(CASES) >= 80


@pytest.fixture(scope="module", autouse=True)
def _warm(tmp_path_factory):
    """Loads what the first command loads, so that its memory is not that of a case."""
    folder = tmp_path_factory.mktemp("warm")
    write_good(folder / "good.pt")
    with pytest.raises(SystemExit):
        main(["inspect", str(folder / "good.pt"), "--json"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_hostile_input_ends_in_one_message(case: Case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case.make(tmp_path / case.file)
    write_good(tmp_path / "good.pt")
    before = sorted(path.name for path in tmp_path.iterdir())
    _forget_peak()
    started, memory = time.process_time(), _peak()
    arguments = [part.replace("FILE", case.file).replace("GOOD", "good.pt") for part in case.command]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    seconds, grown = time.process_time() - started, _peak() - memory
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("mergeot: ")]
    assert stopped.value.code == 1, printed.err[-500:]
    assert len(lines) == 1
    assert lines[0].startswith("mergeot: error: ")
    assert len(printed.err) < 4000
    assert printed.out == ""
    message = printed.err[printed.err.index(lines[0]) :]
    assert case.file in message or "recipe:" in case.name
    for part in case.says:
        assert part in message
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert seconds < _MOST_SECONDS
    assert grown < _MOST_KIB


def _forget_peak() -> None:
    """Lets the system count the largest memory of this process anew, where it can."""
    place = Path("/proc/self/clear_refs")
    if place.exists():
        place.write_text("5")


def _peak() -> int:
    """Returns the largest memory since the count was begun, in KiB."""
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


@pytest.mark.parametrize("limit", ALL, ids=lambda limit: limit.variable)
def test_a_limit_is_raised_by_its_variable(limit, monkeypatch):
    with pytest.raises(CheckpointError, match=limit.variable):
        limit.check(limit.default + 1, "'a.pt' has")
    monkeypatch.setenv(limit.variable, str(limit.default + 1))
    limit.check(limit.default + 1, "'a.pt' has")
    monkeypatch.setenv(limit.variable, "much")
    with pytest.raises(RecipeError, match=limit.variable):
        limit.check(1, "'a.pt' has")


def test_the_page_states_every_limit():
    page = (Path(__file__).parent.parent / "docs" / "reference" / "command-line.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `MERGEOT_MAX_")]
    assert [row.split("`")[1] for row in rows] == [limit.variable for limit in ALL]
    assert [int(row.split("|")[3].replace(",", "")) for row in rows] == [limit.default for limit in ALL]


def test_a_file_whose_name_is_no_text_is_read(tmp_path):
    torch.save(linear(), tmp_path / "good.pt")
    odd = tmp_path / b"\xff\xfe.pt".decode("utf-8", "surrogateescape")
    shutil.copy(tmp_path / "good.pt", odd)
    assert torch.equal(load_checkpoint(odd).state["weight"], linear()["weight"])


def test_archives_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(linear(), tmp_path / "quick.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load_checkpoint(tmp_path / "quick.pt").state["bias"], linear()["bias"])
