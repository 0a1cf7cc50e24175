"""Kills, full disks, interrupts, runs at one time: the old or the new result, and nothing to trip over afterwards."""

from __future__ import annotations

import errno
import gc
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Forked, forked
from torch import nn

import mergekit_ot.report.writing as report_writing
from mergekit_ot import CheckpointError, load_checkpoint, save_checkpoint, torch_stream
from mergekit_ot.cli import interrupting
from mergekit_ot.storage import replacing as replacing_module
from mergekit_ot.storage.outputs import check_output
from mergekit_ot.storage.replacing import replacing

_NETS = """
import torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 2))

def busy():
    open("begun", "w").close()
    torch.linalg.eigh(torch.eye(1600) + torch.rand(1600, 1600))
    raise SystemExit(77)

def stubborn():
    open("begun", "w").close()
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass

def breaks(split):
    yield torch.randn(4, 3), torch.zeros(4).long()
    if split == "test":
        raise KeyError("nobody foresaw this")
"""
_ARCH = ("--arch", "nets.py:mlp", "--input-shape", "3")
_FUSE = ("fuse", "a.pt", "b.pt", *_ARCH)
_WITHIN_SECONDS = 2.0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two networks, which is the working directory."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    Path("nets.py").write_text(_NETS)
    torch.manual_seed(0)
    for name in ("a", "b"):
        torch.save(nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 2)).state_dict(), f"{name}.pt")
    return home


def _run(arguments: tuple[str, ...], folder: Path, prepare: Callable[[], object] | None = None) -> Forked:
    return forked(arguments, folder.parent / f"errors-{time.monotonic_ns()}", prepare)


def _done(arguments: tuple[str, ...], folder: Path, status: int = 0) -> str:
    run = _run(arguments, folder)
    assert run.end() == status, run.text
    return run.text


def _parts(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*part*")]


def _limit_files(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ((*_FUSE, "-o", "f.pt"), "f.pt"),
        ((*_FUSE, "-o", "f.safetensors"), "f.safetensors"),
        (("fuse", "p.pt2", "p.pt2", "-o", "f.pt2"), "f.pt2"),
        (("align", "a.pt", "b.pt", *_ARCH, "-o", "aligned"), "aligned/b.pt"),
        (("inspect", "a.pt", *_ARCH, "--svg", "g.svg"), "g.svg"),
        (("inspect", "a.pt", *_ARCH, "--dot", "g.dot"), "g.dot"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_full_disk_keeps_the_old_file(folder: Path, arguments: tuple[str, ...], written: str) -> None:
    if written.endswith(".pt2"):
        torch.export.save(torch.export.export(nn.Linear(30, 30), (torch.randn(2, 30),)), "p.pt2")
    for old in (None, b""):
        if old is not None:
            Path(written).parent.mkdir(exist_ok=True)
            Path(written).write_bytes(old)
        before = sorted(str(path) for path in folder.rglob("*") if "__pycache__" not in str(path))
        run = _run(arguments, folder, _limit_files(200))
        assert run.end() == 1
        message = run.text.splitlines()[-1]
        assert message.startswith(f"mergeot: error: Cannot write '{written}': {os.strerror(errno.EFBIG)}."), run.text
        assert "ulimit -f" in message
        after = sorted(str(path) for path in folder.rglob("*") if "__pycache__" not in str(path))
        assert after == before
        assert old is None or Path(written).read_bytes() == old


def test_a_full_disk_in_every_format_of_python(tmp_path: Path) -> None:
    """A disk without room, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], check=False).returncode:
        pytest.skip("this user mounts no disks")
    program = torch.export.export(nn.Linear(200, 200), (torch.randn(2, 200),))
    torch.export.save(program, tmp_path / "p.pt2")
    try:
        for suffix in (".pt", ".safetensors", ".pt2"):
            path = disk / f"f{suffix}"
            state = {"weight": torch.zeros(200, 200), "bias": torch.zeros(200)}
            path.write_bytes(b"")
            with pytest.raises(CheckpointError, match=r"No space left on device. Make room there"):
                save_checkpoint(state, path, template=tmp_path / "p.pt2")
            assert path.read_bytes() == b""
            assert _parts(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_report_that_fails_leaves_the_model_and_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _done((*_FUSE, "-o", "f.pt", "--report", "rep"), folder)
    old = {path.name: path.read_bytes() for path in Path("rep").iterdir()}
    data = np.random.default_rng(0).normal(size=(8, 3))
    np.savez("d.npz", x=data, y=np.zeros(8, int))

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    def broken(*_: object, **__: object) -> str:
        raise ZeroDivisionError("nobody foresaw this")

    def interrupted(*_: object, **__: object) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return ""

    kinds = [
        (("page", broken), 1, "internal error: ZeroDivisionError"),
        (("page", interrupted), 130, "mergeot: interrupted."),
        (("size", None), 1, "File too large"),
        (("made", full), 1, "No space left"),
    ]
    for number, ((kind, fails), status, message) in enumerate(kinds):
        output = f"f{number}.pt"

        def prepare(kind: str = kind, fails: Callable[..., str] | None = fails) -> None:
            if kind == "page" and fails is not None:
                monkeypatch.setattr(report_writing, "report_page", fails)
            elif kind == "size":
                _limit_files(9000)()  # room for the model, not for the page
            elif fails is not None:
                monkeypatch.setattr(replacing_module.os, "replace", _replace_but_not("report.md", fails))

        run = _run((*_FUSE, "-o", output, "--report", "rep", "--data", "d.npz"), folder, prepare)
        assert run.end() == status, run.text
        assert f"'{output}' was written, but its report was not." in run.text
        assert message in run.text
        assert load_checkpoint(output).state
        assert _parts(folder) == []
        assert {path.name for path in Path("rep").iterdir()} == set(old)
        if kind != "made":
            assert {path.name: path.read_bytes() for path in Path("rep").iterdir()} == old
    _done((*_FUSE, "-o", "f0.pt", "--report", "rep", "--data", "d.npz"), folder)


def _replace_but_not(name: str, fails: Callable[..., str]) -> Callable[[Path, Path], None]:
    real = os.replace
    return lambda one, other: fails() if other.name == name else real(one, other)


def _wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("work", "number", "status", "line"),
    [
        ("busy", signal.SIGINT, 130, "mergeot: interrupted."),
        ("stubborn", signal.SIGINT, 130, "mergeot: interrupted."),
        ("stubborn", signal.SIGTERM, 143, "mergeot: ended by SIGTERM."),
    ],
)
def test_ctrl_c_ends_what_does_not_listen(folder: Path, work: str, number: int, status: int, line: str) -> None:
    run = _run(("fuse", "a.pt", "b.pt", "--arch", f"nets.py:{work}", "-o", "f.pt"), folder)
    _wait_for(Path("begun"))
    time.sleep(0.1)
    since = time.monotonic()
    run.kill(number)
    assert run.end() == status, run.text
    assert time.monotonic() - since < _WITHIN_SECONDS
    assert run.text.splitlines()[-1] == line
    assert "Traceback" not in run.text
    assert not Path("f.pt").exists()


def test_an_impatient_second_ctrl_c_ends_it_at_once(folder: Path) -> None:
    run = _run(("check", "a.pt", "--arch", "nets.py:stubborn"), folder)
    _wait_for(Path("begun"))
    run.kill(signal.SIGINT)
    time.sleep(0.2)
    since = time.monotonic()
    run.kill(signal.SIGINT)
    assert run.end() == 130
    assert time.monotonic() - since < 0.8
    assert run.text == "a.pt: state dict with 4 tensors\nmergeot: interrupted.\n"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_ctrl_c_while_a_file_is_written(folder: Path, suffix: str) -> None:
    _done((*_FUSE, "-o", f"f{suffix}"), folder)
    old = Path(f"f{suffix}").read_bytes()

    def prepare() -> None:
        real = os.fsync

        def synced(opened: int) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            real(opened)

        os.fsync = synced

    run = _run((*_FUSE, "-o", f"f{suffix}", "--solver", "average"), folder, prepare)
    assert run.end() == 130, run.text
    assert run.text.splitlines()[-1] == "mergeot: interrupted."
    assert Path(f"f{suffix}").read_bytes() == old
    assert _parts(folder) == []


@pytest.mark.parametrize("number", [1, 2, 5])
def test_an_interrupt_while_torch_writes_waits_for_it(tmp_path: Path, number: int) -> None:
    class Weights(dict):
        """Is interrupted while it is pickled."""

        def __reduce__(self) -> tuple[object, ...]:
            os.kill(os.getpid(), signal.SIGINT)
            return dict, ()

    content = {f"w{each}": torch.zeros(500) for each in range(number)} | {"last": Weights()}
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "f.pt") as beside, torch_stream(beside) as stream:
        torch.save(content, stream)
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_an_interrupt_that_a_library_hides_stays_one(tmp_path: Path) -> None:
    def hides() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")

    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "f.txt"):
        hides()
    assert list(tmp_path.iterdir()) == []


def test_signals_are_as_they_were_before(folder: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupting.stopping() as stop:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGINT) == stop.ask
    finally:
        signal.signal(signal.SIGHUP, before[2])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_runs_at_one_time_all_succeed(folder: Path) -> None:
    results = set()
    for solver in ("average", "wb"):
        _done((*_FUSE, "-o", "f.pt", "--solver", solver), folder)
        results.add(Path("f.pt").read_bytes())
    runs = [_run((*_FUSE, "-o", "f.pt", "--solver", solver), folder) for solver in ("average", "wb", "average")]
    assert [run.end() for run in runs] == [0, 0, 0], [run.text for run in runs]
    assert len(results) == 2
    assert Path("f.pt").read_bytes() in results
    assert _parts(folder) == []


def test_a_folder_that_may_not_be_written_is_told_at_once(folder: Path) -> None:
    closed = Path("closed")
    closed.mkdir()
    save_checkpoint(nn.Linear(2, 2), "protected.pt")
    os.chmod("protected.pt", 0o444)
    closed.chmod(0o555)
    if os.geteuid() == 0:
        for place in (folder.parent, *folder.parents):
            if place.stat().st_uid == 0 and place.stat().st_mode & 0o005 != 0o005:
                place.chmod(place.stat().st_mode | 0o055) if str(place).startswith("/tmp/pytest") else None

    def as_somebody() -> None:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)

    commands = {
        (*_FUSE, "-o", "closed/f.pt"): "Cannot write 'closed/f.pt': the folder 'closed' is not writable.",
        (*_FUSE, "-o", "protected.pt"): "is not writable" if os.geteuid() == 0 else "is protected against writing",
        ("inspect", "a.pt", *_ARCH, "--svg", "closed/g.svg"): "the folder 'closed' is not writable",
        ("align", "a.pt", "b.pt", *_ARCH, "-o", "closed/new"): "the folder 'closed' is not writable",
        ("align", "a.pt", "b.pt", *_ARCH, "-o", "closed"): "the folder 'closed' is not writable",
    }
    for arguments, message in commands.items():
        run = _run(arguments, folder, as_somebody)
        assert run.end() == 1, run.text
        assert message in run.text
        assert "Choose a folder that you may write to" in run.text or "chmod u+w" in run.text
        assert "internal error" not in run.text
    assert list(closed.iterdir()) == []
    check_output("protected.pt") if os.geteuid() == 0 else None


@pytest.mark.slow
def test_fifty_kills(folder: Path) -> None:
    """Half of them at random moments of a fusion, half while its files are written."""
    draws = random.Random(0)
    results = {}
    for solver in ("average", "wb"):
        since = time.monotonic()
        _done((*_FUSE, "-o", "f.pt", "--solver", solver), folder)
        results[Path("f.pt").read_bytes()] = solver
        whole = time.monotonic() - since
    killed, left, seen = 0, 0, set()
    for number in range(50):
        begun, telling = os.pipe()

        def prepare(telling: int = telling) -> None:
            real = os.fsync

            def synced(opened: int) -> None:
                os.write(telling, b"x")
                time.sleep(0.005)
                real(opened)
                time.sleep(0.005)

            os.fsync = synced

        solver = ("average", "wb")[number % 2]
        run = _run((*_FUSE, "-o", "f.pt", "--solver", solver), folder, prepare)
        os.close(telling)
        if number < 25:
            time.sleep(draws.uniform(0, whole))
        else:
            os.read(begun, 1)
            time.sleep(draws.uniform(0, 0.03))
        run.kill()
        killed += run.status() == -signal.SIGKILL
        os.close(begun)
        left += len(_parts(folder))
        assert Path("f.pt").read_bytes() in results
        seen.add(results[Path("f.pt").read_bytes()])
        if number % 10 == 9:
            _done((*_FUSE, "-o", "f.pt", "--solver", "wb"), folder)
            assert results[Path("f.pt").read_bytes()] == "wb"
            assert _parts(folder) == []
    assert killed >= 40
    assert left > 0
    assert seen == {"average", "wb"}


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.3, 1.0, 2.0])
def test_ctrl_c_while_python_starts(folder: Path, delay: float) -> None:
    command = [sys.executable, "-m", "mergekit_ot.cli.app", "check", "a.pt", "--arch", "nets.py:stubborn"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        time.sleep(delay)
        since = time.monotonic()
        run.send_signal(signal.SIGINT)
        _, error = run.communicate(timeout=30)
        # Before the command line is imported, Python itself ends by the signal, which shells call 130 too.
        assert run.returncode in (130, -signal.SIGINT), error
        assert time.monotonic() - since < 2 * _WITHIN_SECONDS
        assert run.returncode != 130 or error.splitlines()[-1] == "mergeot: interrupted."
