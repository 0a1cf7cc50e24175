"""Kills, full disks, interrupts, runs at one time: the old or the new result, and nothing to trip over afterwards."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from forks import forked
from torch import nn

import mergekit_ot.report.writing as report_writing
from mergekit_ot import CheckpointError, load_checkpoint, plot_barrier, save_checkpoint, torch_stream, write_text
from mergekit_ot.cli import interrupting
from mergekit_ot.cli.app import main
from mergekit_ot.recipe import make_recipe
from mergekit_ot.storage import replacing as replacing_module
from mergekit_ot.storage.replacing import replacing

_NETS = """
import numpy as np
import torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 2))

def busy():
    open("begun", "w").close()
    np.linalg.eigh(np.random.rand(2500, 2500))
    raise SystemExit(77)

def stubborn():
    open("begun", "w").close()
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass
"""
_ARCH = ("--arch", "nets.py:mlp", "--input-shape", "3")
_FUSE = ("fuse", "a.pt", "b.pt", *_ARCH)
_WITHIN_SECONDS = 2.0


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Imports what the commands need, once for all processes that are forked."""
    folder = tmp_path_factory.mktemp("imported")
    (folder / "nets.py").write_text(_NETS)
    torch.save(nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 2)).state_dict(), folder / "a.pt")
    model, arch = str(folder / "a.pt"), ("--arch", f"{folder}/nets.py:mlp", "--input-shape", "3")
    for arguments in (
        ("fuse", model, model, *arch, "-o", str(folder / "f.safetensors"), "--report", str(folder / "rep")),
        ("align", model, model, *arch, "-o", str(folder / "aligned")),
        ("inspect", model, *arch, "--svg", str(folder / "g.svg"), "--dot", str(folder / "g.dot")),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert not stopped.value.code


@pytest.fixture
def folder(imported: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two networks, which is the working directory."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    Path("nets.py").write_text(_NETS)
    torch.manual_seed(0)
    for name in ("a", "b"):
        torch.save(nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 2)).state_dict(), f"{name}.pt")
    return home


def _done(arguments: tuple[str, ...]) -> None:
    run = forked(arguments)
    assert run.end() == 0, run.text


def _parts(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*part*")]


def _limit_files(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@contextlib.contextmanager
def _files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


Writers = dict[str, Callable[[Path], object]]


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> Writers:
    """What writes each kind of file, by name."""
    folder = tmp_path_factory.mktemp("program")
    program = torch.export.export(nn.Linear(50, 50), (torch.randn(2, 50),))
    torch.export.save(program, folder / "p.pt2")
    state = {name: torch.zeros_like(value) for name, value in program.state_dict.items()}
    curve = {"t": [0.0, 1.0], "loss": [0.1, 0.1], "accuracy": None, "loss_barrier": 0.0, "error_barrier": None}
    pictures = {f"c.{kind}": lambda path: plot_barrier({"naive": curve}, path) for kind in ("png", "svg")}
    return {
        "f.pt": lambda path: save_checkpoint(state, path),
        "f.safetensors": lambda path: save_checkpoint(state, path),
        "f.pt2": lambda path: save_checkpoint(state, path, template=load_checkpoint(folder / "p.pt2", trust=True)),
        "r.yaml": lambda path: make_recipe(models=["a", "b"]).write(path),
        "t.md": lambda path: write_text(path, "text" * 100, comment="<!-- {} -->"),
        **pictures,
    }


def test_no_file_is_half_written_when_there_is_no_room(tmp_path: Path, writers: Writers) -> None:
    place = tmp_path / "place"
    place.mkdir()
    for name, write in writers.items():
        path = place / name
        for has_old in (False, True):
            if has_old:
                write(path)
            old = path.read_bytes() if has_old else None
            with _files_of_at_most(30), pytest.raises(CheckpointError, match=r"File too large.*ulimit -f"):
                write(path)
            if path.suffix in (".pt", ".pt2"):
                gc.collect()  # the writer of torch ends the process when it is thrown away after a failure
            assert (path.read_bytes() if path.exists() else None) == old
            assert _parts(place) == []


def test_no_file_is_half_written_when_writing_is_interrupted(
    tmp_path: Path, writers: Writers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, write in writers.items():
        path = tmp_path / name
        write(path)
        old = path.read_bytes()
        monkeypatch.setattr(os, "fsync", lambda _: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            write(path)
        monkeypatch.undo()
        assert path.read_bytes() == old
        assert _parts(tmp_path) == []


def test_a_command_without_room_says_so(folder: Path) -> None:
    run = forked((*_FUSE, "-o", "f.pt"), _limit_files(200))
    assert run.end() == 1
    message = "mergeot: error: Cannot write 'f.pt': File too large. Raise the limit on the size of files (ulimit -f)"
    assert run.text.splitlines()[-1].startswith(message)
    assert not Path("f.pt").exists()
    assert _parts(folder) == []


def test_a_full_disk_in_every_format(tmp_path: Path) -> None:
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
                save_checkpoint(state, path, template=load_checkpoint(tmp_path / "p.pt2", trust=True))
            assert path.read_bytes() == b""
            assert _parts(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_report_that_fails_leaves_the_model_and_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _done((*_FUSE, "-o", "f.pt", "--report", "rep"))
    old = {path.name: path.read_bytes() for path in Path("rep").iterdir()}

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
        (("made", full), 1, "No space left"),
    ]
    for number, ((kind, fails), status, message) in enumerate(kinds):
        output = f"f{number}.pt"

        def prepare(kind: str = kind, fails: Callable[..., str] = fails) -> None:
            if kind == "page":
                monkeypatch.setattr(report_writing, "report_page", fails)
            else:
                monkeypatch.setattr(replacing_module.os, "replace", _replace_but_not("report.md", fails))

        run = forked((*_FUSE, "-o", output, "--report", "rep"), prepare)
        assert run.end() == status, run.text
        assert f"'{output}' was written, but its report was not." in run.text
        assert message in run.text
        assert load_checkpoint(output).state
        assert _parts(folder) == []
        assert {path.name for path in Path("rep").iterdir()} == set(old)
        if kind != "made":
            assert {path.name: path.read_bytes() for path in Path("rep").iterdir()} == old


def _replace_but_not(name: str, fails: Callable[..., str]) -> Callable[[Path, Path], object]:
    real = os.replace
    return lambda one, other: fails() if other.name == name else real(one, other)


def _slowness() -> float:
    """Returns how many seconds a second of work takes here, other processes being at work as well."""
    since, worked = time.monotonic(), time.process_time()
    while time.process_time() - worked < 0.05:
        pass
    return max(1.0, 2 * (time.monotonic() - since) / (time.process_time() - worked) - 1)


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
    run = forked(("fuse", "a.pt", "b.pt", "--arch", f"nets.py:{work}", "-o", "f.pt"))
    _wait_for(Path("begun"))
    time.sleep(0.1)
    since = time.monotonic()
    run.kill(number)
    assert run.end() == status, run.text
    assert time.monotonic() - since < _WITHIN_SECONDS * _slowness()
    assert run.text.splitlines()[-1] == line
    assert "Traceback" not in run.text
    assert not Path("f.pt").exists()


def test_an_impatient_second_ctrl_c_ends_it_at_once(folder: Path) -> None:
    run = forked(("check", "a.pt", "--arch", "nets.py:stubborn"))
    _wait_for(Path("begun"))
    run.kill(signal.SIGINT)
    time.sleep(0.2)
    since = time.monotonic()
    run.kill(signal.SIGINT)
    assert run.end() == 130
    assert time.monotonic() - since < 0.8 * _slowness()
    assert run.text.splitlines()[1:] == ["mergeot: interrupted."]


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


def test_errors_that_led_to_each_other_end_too(tmp_path: Path) -> None:
    """Where a library raises one of them anew, each stands behind the other; an interrupt may stand behind both."""
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__cause__, second.__context__ = second, first

    def fails() -> None:
        raise first

    with pytest.raises(RuntimeError, match="first"), replacing(tmp_path / "f.txt"):
        fails()
    second.__cause__, first.__context__ = first, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "f.txt"):
        fails()
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
    runs = [forked((*_FUSE, "-o", "f.pt", "--solver", solver)) for solver in ("average", "wb", "average")]
    assert [run.end() for run in runs] == [0, 0, 0], [run.text for run in runs]
    written = load_checkpoint("f.pt")
    assert written.provenance["solver"] in ("average", "wb")
    assert len(dict(written.state)) == 4
    assert _parts(folder) == []


@pytest.fixture
def open_folder(folder: Path) -> Iterator[Path]:
    """The folder with two networks at a place to which every user may go."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / "home"
        shutil.copytree(folder, place)
        for path in (Path(name), place):
            path.chmod(0o755)
        os.chdir(place)
        yield place
        os.chdir(folder)


def test_a_folder_that_may_not_be_written_is_told_at_once(open_folder: Path) -> None:
    closed = Path("closed")
    closed.mkdir()
    Path("open").mkdir()
    save_checkpoint(nn.Linear(2, 2), "open/protected.pt")
    os.chmod("open/protected.pt", 0o444)
    closed.chmod(0o555)
    Path("open").chmod(0o777)

    def as_somebody() -> None:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)

    commands = {
        (*_FUSE, "-o", "closed/f.pt"): "Cannot write 'closed/f.pt': the folder 'closed' is not writable.",
        (*_FUSE, "-o", "open/f.pt", "--report", "closed/rep"): "the folder 'closed' is not writable",
        (*_FUSE, "-o", "open/f.pt", "--report", "closed"): "the folder 'closed' is not writable",
        (*_FUSE, "-o", "open/protected.pt", "--overwrite"): "is protected against writing",
        ("inspect", "a.pt", *_ARCH, "--svg", "closed/g.svg"): "the folder 'closed' is not writable",
        ("align", "a.pt", "b.pt", *_ARCH, "-o", "closed/new"): "the folder 'closed' is not writable",
        ("align", "a.pt", "b.pt", *_ARCH, "-o", "closed"): "the folder 'closed' is not writable",
    }
    for arguments, message in commands.items():
        run = forked(arguments, as_somebody)
        assert run.end() == 1, run.text
        assert message in run.text
        assert "Choose a folder that you may write to" in run.text or "chmod u+w" in run.text
        assert "a.pt: state dict" not in run.text  # nothing was read
    assert list(closed.iterdir()) == []
    assert [path.name for path in Path("open").iterdir()] == ["protected.pt"]


@pytest.mark.slow
def test_fifty_kills(folder: Path) -> None:
    """Half of them at random moments of a fusion, half while its files are written."""
    draws = random.Random(0)
    results, whole = {}, {}
    for solver in ("average", "wb", "average", "wb"):
        since = time.monotonic()
        _done((*_FUSE, "-o", "f.pt", "--solver", solver))
        results[Path("f.pt").read_bytes()] = solver
        # Of each solver that of the second run, which is as long as those that are killed.
        whole[solver] = time.monotonic() - since
    killed, left, seen = 0, 0, set()
    for number in range(50):
        begun, telling = os.pipe()

        def prepare(telling: int = telling) -> None:
            real = os.fsync

            def synced(opened: int) -> None:
                os.write(telling, b"x")
                time.sleep(0.02)
                real(opened)
                time.sleep(0.02)

            os.fsync = synced

        solver = ("average", "wb")[number % 2]
        run = forked((*_FUSE, "-o", "f.pt", "--solver", solver), prepare)
        os.close(telling)
        if number < 25:
            time.sleep(draws.uniform(0, whole[solver]))
        else:
            os.read(begun, 1)
            # The model and the file that describes it are synced one after the other.
            time.sleep(draws.uniform(0, 0.175))
        run.kill()
        killed += run.end() == -signal.SIGKILL
        os.close(begun)
        left += len(_parts(folder))
        assert Path("f.pt").read_bytes() in results
        seen.add(results[Path("f.pt").read_bytes()])
        if number % 10 == 9:
            _done((*_FUSE, "-o", "f.pt", "--solver", "wb"))
            assert results[Path("f.pt").read_bytes()] == "wb"
            assert _parts(folder) == []
    assert killed >= 40
    assert left > 0
    assert seen == {"average", "wb"}


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.5, 2.0])
def test_ctrl_c_while_the_command_line_is_imported(folder: Path, delay: float) -> None:
    code = "print('begun', flush=True)\nfrom mergekit_ot.cli.app import main\n"
    code += "main(['check', 'a.pt', '--arch', 'nets.py:stubborn'])"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "begun\n"
        time.sleep(delay)
        since = time.monotonic()
        run.send_signal(signal.SIGINT)
        _, error = run.communicate(timeout=30)
        # Before the command line is imported, Python itself ends by the signal, which shells call 130 too.
        assert run.returncode in (130, -signal.SIGINT), error
        assert time.monotonic() - since < 2 * _WITHIN_SECONDS * _slowness()
        assert run.returncode != 130 or error.splitlines()[-1] == "mergeot: interrupted."
