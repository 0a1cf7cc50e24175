"""Records that are kept between runs: whole or not at all, bounded, in the user's folder, and never an error."""

from __future__ import annotations

import os
import pickle
import sys
import threading
from pathlib import Path

import pytest
from test_cli import Run, run  # noqa: F401

from mergekit_ot.storage.kept import KeptRecords, user_folder

KEYS = [f"{number:064x}" for number in range(20)]


@pytest.fixture
def records(tmp_path: Path) -> KeptRecords:
    return KeptRecords(tmp_path / "kept" / "here")


def test_what_is_written_is_read(records: KeptRecords) -> None:
    assert records.read(KEYS[0]) is None
    assert not records.folder.exists()
    content = {"a": [1, "ü", None, {"b": 0.1}], "sentence": "a\nb"}
    records.write(KEYS[0], content)
    assert records.read(KEYS[0]) == content
    assert records.read(KEYS[1]) is None
    if os.name == "posix":
        assert records.folder.stat().st_mode & 0o077 == 0


def test_the_oldest_are_dropped(tmp_path: Path) -> None:
    records = KeptRecords(tmp_path, most_records=3)
    for number, key in enumerate(KEYS[:3]):
        records.write(key, {"number": number})
        os.utime(tmp_path / f"{key}.json", (number, number))
    assert records.read(KEYS[0]) is not None  # now the last used
    records.write(KEYS[3], {})
    assert [key for key in KEYS[:4] if records.read(key) is not None] == [KEYS[0], KEYS[2], KEYS[3]]


def test_their_bytes_are_bounded(tmp_path: Path) -> None:
    records = KeptRecords(tmp_path, most_bytes=2000)
    for number, key in enumerate(KEYS):
        records.write(key, {"text": "x" * 300})
        os.utime(tmp_path / f"{key}.json", (number, number))
    assert sum(records.sizes().values()) <= 2000
    assert records.read(KEYS[-1]) is not None
    records.write(KEYS[0], {"text": "x" * 3000})
    assert records.read(KEYS[0]) is None


def test_only_records_are_removed(records: KeptRecords) -> None:
    records.write(KEYS[0], {})
    mine = records.folder / "mine.json"
    mine.write_text("{}")
    assert records.clear() == 1
    assert list(records.folder.iterdir()) == [mine]
    assert records.clear() == 0


def test_nothing_in_a_file_is_executed(records: KeptRecords, tmp_path: Path) -> None:
    class Writing:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    records.folder.mkdir(parents=True)
    (records.folder / f"{KEYS[0]}.json").write_bytes(pickle.dumps(Writing()))
    assert records.read(KEYS[0]) is None
    assert not (tmp_path / "executed").exists()


@pytest.mark.skipif(os.name != "posix", reason="links and pipes")
def test_what_is_no_file_is_left_alone(records: KeptRecords, tmp_path: Path) -> None:
    records.folder.mkdir(parents=True)
    os.mkfifo(records.folder / f"{KEYS[0]}.json")
    assert records.read(KEYS[0]) is None
    records.write(KEYS[0], {})
    assert records.read(KEYS[0]) is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    records = KeptRecords(tmp_path / "file" / "below")
    records.write(KEYS[0], {})
    assert records.read(KEYS[0]) is None
    assert (records.sizes(), records.clear()) == ({}, 0)


def test_writers_at_one_time_leave_a_whole_record(records: KeptRecords) -> None:
    contents = [{"number": number, "text": str(number) * 5000} for number in range(4)]
    seen: list[object] = []

    def write(content: dict[str, object]) -> None:
        for _ in range(5):
            records.write(KEYS[0], content)
            seen.append(records.read(KEYS[0]))

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 20
    assert all(found in contents for found in seen)
    assert [path.name for path in records.folder.iterdir()] == [f"{KEYS[0]}.json"]


def test_where_the_folder_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MERGEOT_CACHE", "OFF")
    assert user_folder() is None
    monkeypatch.setenv("MERGEOT_CACHE", "there")
    assert user_folder() == Path("there")
    monkeypatch.delenv("MERGEOT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert user_folder() == tmp_path / "shared" / "mergeot"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert user_folder() == tmp_path / ".cache" / "mergeot"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert user_folder() == tmp_path / "Library" / "Caches" / "mergeot"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert user_folder() == tmp_path / "local" / "mergeot" / "Cache"


def test_commands_keep_traces_and_show_them(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("MERGEOT_CACHE", "kept")
    given = ("fuse", "a.pt", "b.pt", *run.arch, "--input-shape", "4")
    first = run.json(*given)
    shown = run.json("cache")
    assert (Path(shown["folder"]), shown["traces"], shown["removed"]) == (Path("kept/traces"), 1, 0)
    assert shown["bytes"] == sum(path.stat().st_size for path in Path("kept/traces").iterdir())
    again = run.json(*given)
    assert again["groups"] == first["groups"]
    assert run.json("cache")["traces"] == 1
    run.json("align", "a.pt", "b.pt", *run.arch, "--input-shape", "4", "-o", "aligned")
    assert run.json("cache")["traces"] == 1
    assert run.json("cache", "--clear") == {"folder": shown["folder"], "traces": 0, "bytes": 0, "removed": 1}
    run("cache")
    assert "0 traces" in run.err
    monkeypatch.setenv("MERGEOT_CACHE", "off")
    run.json(*given)
    assert run.json("cache") == {"folder": None, "traces": 0, "bytes": 0, "removed": 0}
    assert not list(Path("kept/traces").iterdir())
