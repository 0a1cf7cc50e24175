"""What is written, and what never is: inputs, files of others and what is no file stay, whoever writes."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mergekit_ot import CheckpointError, MergeotError, load_checkpoint, plot_barrier, save_checkpoint, write_text
from mergekit_ot.cli.app import main
from mergekit_ot.recipe import make_recipe
from mergekit_ot.sources.spec_files import spec_files
from mergekit_ot.storage.marks import is_ours
from mergekit_ot.storage.outputs import check_output
from mergekit_ot.storage.replacing import replacing

_NETS = "from torch import nn\ndef mlp():\n    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))\n"
_ARCH = ("--arch", "nets.py:mlp", "--input-shape", "3")
_FUSE = ("fuse", "a.pt", "b.pt", *_ARCH)

Command = Callable[..., str]


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command line in a folder with two networks, and returns its message."""
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(_NETS)
    torch.manual_seed(0)
    for name in ("a", "b"):
        torch.save(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).state_dict(), f"{name}.pt")
    inputs, targets = np.random.default_rng(0).normal(size=(20, 3)), np.arange(20) % 2
    np.savez("d.npz", x_train=inputs, y_train=targets, x_test=inputs, y_test=targets)

    def run(*arguments: str, status: int = 0) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        error = capsys.readouterr().err
        assert (stopped.value.code or 0) == status, error
        assert "internal error" not in error
        return error

    return run


def _content(folder: Path) -> dict[str, object]:
    """Returns what stands in a folder: kind, mode and bytes or target of everything."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        if "__pycache__" not in str(path):
            inside = path.read_bytes() if stat.S_ISREG(state.st_mode) else None
            found[str(path)] = (state.st_mode, inside, os.readlink(path) if path.is_symlink() else None)
    return found


def _save(path: Path, **how: bool) -> Path:
    torch.manual_seed(0)
    return save_checkpoint(nn.Linear(2, 2), path, **how)


def _place(folder: Path, kind: str) -> Path:
    """Makes something that is not to be replaced."""
    path = folder / "out.pt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except OSError:
            pytest.skip("this user makes no devices")
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to a device":
        path.symlink_to(os.devnull)
    elif kind == "link to nothing":
        path.symlink_to("nothing")
    elif kind == "link to itself":
        path.symlink_to("out.pt")
    elif kind == "file of another":
        path.write_text("mine")
    elif kind == "link to a file of another":
        (folder / "mine.txt").write_text("mine")
        path.symlink_to("mine.txt")
    return path


_KINDS = {
    "pipe": "is a named pipe",
    "device": "is a device",
    "folder": "is a folder",
    "link to a device": "is a device",
    "link to nothing": "is a link to 'nothing', and no file is there",
    "link to itself": "is a link to 'out.pt', and no file is there",
    "file of another": "exists and was not written by mergeot",
    "link to a file of another": "exists and was not written by mergeot",
}


@pytest.mark.parametrize("kind", _KINDS)
def test_what_is_no_file_of_ours_is_never_replaced(tmp_path: Path, kind: str) -> None:
    path = _place(tmp_path, kind)
    before = _content(tmp_path)
    for overwrite in (False, True):
        if overwrite and kind.endswith("another"):
            continue
        for write in (check_output, _save):
            with pytest.raises(CheckpointError, match=_KINDS[kind]):
                write(path, overwrite=overwrite)
    assert _content(tmp_path) == before


@pytest.mark.parametrize("kind", ["pipe", "link to nothing", "file of another"])
@pytest.mark.parametrize(
    "arguments",
    [
        (*_FUSE, "-o", "out.pt"),
        ("align", "a.pt", "x/out.pt", *_ARCH, "-o", "."),
        ("inspect", "a.pt", *_ARCH, "--svg", "out.pt"),
        ("inspect", "a.pt", *_ARCH, "--dot", "out.pt"),
        ("inspect", "a.pt", *_ARCH, "--modules", "out.pt"),
        ("barrier", "a.pt", "b.pt", *_ARCH, "--data", "d.npz", "--plot", "out.svg"),
        (*_FUSE, "-o", "f.pt", "--report", "rep"),
    ],
    ids=lambda arguments: " ".join([arguments[0], *arguments[-2:]]),
)
def test_every_command_refuses_before_any_work(
    command: Command, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], kind: str
) -> None:
    Path("rep").mkdir()
    Path("x").mkdir()
    Path("b.pt").rename("x/out.pt") if arguments[0] == "align" else None
    path = _place(Path(), kind)
    if "--plot" in arguments or "--report" in arguments:
        path.rename("out.svg" if "--plot" in arguments else "rep/report.html")
    before = _content(Path())

    def reads(*_: object, **__: object) -> None:
        raise AssertionError("a file was read")

    for place in ("fusing", "aligning", "looking", "connecting"):
        monkeypatch.setattr(f"mergekit_ot.jobs.{place}.read_sources", reads)
    message = command(*arguments, status=1)
    assert _KINDS[kind] in message.replace(" 'nothing'", " 'nothing'")
    assert _content(Path()) == before


@pytest.mark.parametrize(
    ("arguments", "lost"),
    [
        (("-o", "b.pt"), "b.pt"),
        (("-o", "hard.pt"), "a.pt"),
        (("-o", "soft.pt"), "a.pt"),
        (("-o", "nets.py"), "nets.py"),
        (("-o", "soft.py"), "nets.py"),
        (("-o", "d.npz", "--data", "d.npz?batch=5"), "d.npz"),
        (("-o", "pairs.py", "--data", "pairs.py:pairs?path=d.npz"), "pairs.py"),
        (("-o", "d.npz", "--data", "pairs.py:pairs?path=d.npz"), "d.npz"),
        (("-o", "pairs.py", "--data", "pairs:pairs"), "pairs.py"),
        (("-o", "wide.py", "--target", "wide.py:mlp"), "wide.py"),
        (("-o", "r.yaml", "--recipe", "r.yaml"), "r.yaml"),
        (("--recipe", "r.yaml", "--report", "rep"), "r.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_no_input_is_ever_an_output(command: Command, arguments: tuple[str, ...], lost: str) -> None:
    os.link("a.pt", "hard.pt")
    Path("soft.pt").symlink_to("a.pt")
    Path("soft.py").symlink_to(Path("nets.py").resolve())
    Path("pairs.py").write_text("def pairs(path=None):\n    raise AssertionError\n")
    Path("wide.py").write_text(_NETS)
    Path("rep").mkdir()
    Path("r.yaml").write_text("seed: 3\n")
    os.link("r.yaml", "rep/recipe.yaml")
    before = _content(Path())
    for flags in ((), ("--overwrite",)):
        message = command(*_FUSE, *arguments, *flags, status=1)
        assert "it would be lost" in message
        assert lost in message
        assert _content(Path()) == before


def test_outputs_are_not_one_another(command: Command) -> None:
    assert "are both" in command("inspect", "a.pt", *_ARCH, "--svg", "g.svg", "--dot", "./g.svg", status=1)
    assert "are both" in command(*_FUSE, "-o", "rep", "--report", "rep", status=1)
    Path("rep").mkdir()
    assert "are both" in command(*_FUSE, "-o", "rep/report.json", "--report", "rep", status=1)
    assert "names a folder" in command(*_FUSE, "-o", "new/", status=1)
    assert list(Path("rep").iterdir()) == []


def test_what_we_wrote_is_replaced_by_the_same_command(command: Command) -> None:
    commands = [
        (*_FUSE, "-o", "f.pt", "--report", "rep"),
        (*_FUSE, "-o", "f.safetensors"),
        ("align", "a.pt", "b.pt", *_ARCH, "-o", "aligned"),
        ("inspect", "a.pt", *_ARCH, "--svg", "g.svg", "--dot", "g.dot", "--modules", "m.svg"),
    ]
    for arguments in commands:
        command(*arguments)
    # They hold times; the library writes the two metadata of safetensors in any order.
    changing = {"rep/report.html", "rep/report.json", "rep/report.md", "f.safetensors"}
    before = {name: value for name, value in _content(Path()).items() if name not in changing}
    for arguments in commands:
        command(*arguments)
    command("fuse", "--recipe", "rep/recipe.yaml")
    after = _content(Path())
    assert {name: value for name, value in after.items() if name not in changing} == before
    written = [path for path in Path().rglob("*") if path.is_file()]
    ours = {path.name for path in written if is_ours(path) and "__pycache__" not in str(path)}
    theirs = {"nets.py", "a.pt", "b.pt", "d.npz"}
    assert ours == {path.name for path in written if "__pycache__" not in str(path)} - theirs | {"b.pt"}


def test_a_file_of_another_is_replaced_where_that_is_said(command: Command) -> None:
    for name in ("f.pt", "rep/report.md", "g.svg", "c.svg", "aligned/b.pt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("mine")
    commands = [
        (*_FUSE, "-o", "f.pt", "--report", "rep"),
        ("align", "a.pt", "b.pt", *_ARCH, "-o", "aligned"),
        ("inspect", "a.pt", *_ARCH, "--svg", "g.svg"),
        ("barrier", "a.pt", "b.pt", *_ARCH, "--data", "d.npz", "--points", "2", "--plot", "c.svg"),
    ]
    for arguments in commands:
        assert "with --overwrite" in command(*arguments, status=1)
        command(*arguments, "--overwrite")
        command(*arguments)
    Path("f.pt").write_text("mine")
    Path("r.yaml").write_text("overwrite: true\n")
    command(*_FUSE, "-o", "f.pt", "--recipe", "r.yaml")
    # A report is repeated by whoever wrote it.
    assert "overwrite" not in Path("rep/recipe.yaml").read_text() + Path("rep/report.md").read_text()


def test_python_follows_the_same_rule(tmp_path: Path) -> None:
    curve = {"t": [0.0, 1.0], "loss": [0.1, 0.1], "accuracy": None, "loss_barrier": 0.0, "error_barrier": None}
    exported, program = tmp_path / "theirs.pt2", torch.export.export(nn.Linear(3, 3), (torch.randn(2, 3),))
    torch.export.save(program, exported)
    assert not is_ours(exported)
    template = load_checkpoint(exported, trust=True)

    def draw(path: Path, **how: bool) -> Path:
        return plot_barrier({"naive": curve}, path, **how)

    writers = [
        (tmp_path / "net.pt", _save),
        (tmp_path / "net.safetensors", _save),
        (tmp_path / "net.pt2", lambda path, **how: save_checkpoint(program.state_dict, path, template=template, **how)),
        *[(tmp_path / f"curve.{kind}", draw) for kind in ("png", "pdf", "svg")],
        (tmp_path / "page.md", lambda path, **how: write_text(path, "# page", comment="<!-- {} -->", **how)),
        (tmp_path / "r.yaml", lambda path, **how: make_recipe(models=["a", "b"], **how).write(path)),
    ]
    for path, write in writers:
        write(path)
        written = path.read_bytes()
        write(path)
        # The library writes the metadata of safetensors in any order.
        assert path.suffix in (".pt2", ".safetensors") or path.read_bytes() == written
        path.write_text("mine")
        with pytest.raises(MergeotError, match=r"was not written by mergeot.*overwrite=True in Python"):
            write(path)
        write(path, overwrite=True)
        path.write_bytes(b"")
        write(path)  # nothing is lost with an empty file
        assert is_ours(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"mergekit_ot",
        b"from mergekit_ot import fuse  # written by mergeot users\n",
        b"<!-- written by mergeot -->\nand changed by me\n",
        b'{"a": 1, "made_by": "mergekit_ot 1"}',
        b"PK\x03\x04formatq\x01X\x0b\0\0\0mergekit_otq",
        b"x" * 5000 + b'{"format": "mergekit_ot"}' + b"x" * 5000,
    ],
)
def test_a_file_that_only_speaks_of_us_is_not_ours(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert not is_ours(tmp_path / "file")


def test_modes_and_links_are_kept(tmp_path: Path) -> None:
    target, link = tmp_path / "kept" / "net.pt", tmp_path / "net.safetensors"
    target.parent.mkdir()
    mask = os.umask(0o027)
    try:
        for path in (tmp_path / "new.pt", tmp_path / "new.safetensors"):
            save_checkpoint(nn.Linear(2, 2), path)
            assert stat.S_IMODE(path.stat().st_mode) == 0o640
    finally:
        os.umask(mask)
    save_checkpoint(nn.Linear(2, 2), target)
    link.symlink_to(target)
    for mode in (0o600, 0o664):
        target.chmod(mode)
        save_checkpoint(nn.Linear(3, 3), link)
        assert link.is_symlink()
        assert stat.S_IMODE(target.stat().st_mode) == mode
        # The name that was given says the format.
        assert target.read_bytes()[8:9] == b"{"
    names = {path.name for path in tmp_path.rglob("*")}
    assert names == {"kept", "net.pt", "net.safetensors", "new.pt", "new.safetensors"}


def test_names_that_no_file_can_have_are_refused_at_once(tmp_path: Path) -> None:
    longest = "n" * 252 + ".pt"
    save_checkpoint(nn.Linear(2, 2), tmp_path / longest)
    for name, message in {
        "n" + longest: "File name too long. Give a shorter name",
        "o" * 10**6: "…': File name too long",
        "a\0b.pt": "no file can have this name",
        "\ud800.pt": "no file can have this name",
        "no/out.pt": "the folder '.*no' does not exist",
        f"{longest}/out.pt": "is a file, not a folder",
    }.items():
        with pytest.raises(CheckpointError, match=message) as refused:
            check_output(tmp_path / name)
        assert len(str(refused.value)) < 2000
    deep = tmp_path
    while len(str(deep)) < 3800:
        deep = deep / ("d" * 200)
        deep.mkdir()
    with pytest.raises(CheckpointError, match="Give a shorter name"):
        check_output(deep / ("n" * (4090 - len(str(deep)))))


def test_the_place_of_writing_cannot_be_foreseen_or_shared(tmp_path: Path) -> None:
    places = set()
    for _ in range(3):
        with replacing(tmp_path / "out.txt") as beside:
            beside.write_text("written")
            assert stat.S_IMODE(beside.parent.stat().st_mode) == 0o700
            assert beside.parent.name.startswith(".out.txt.")
            places.add(beside)
        (tmp_path / "out.txt").unlink()
    assert len(places) == 3
    assert list(tmp_path.iterdir()) == []


def test_left_overs_are_removed_but_not_from_under_a_run_that_lives(tmp_path: Path) -> None:
    dead = [tmp_path / f".{name}.abc.mergeot-part" for name in ("out.txt", "other.pt")]
    for folder in dead:
        folder.mkdir()
        (folder / "half").write_text("half")
    mine = tmp_path / ".notes.mergeot-parts"
    mine.mkdir()
    with replacing(tmp_path / "first.txt") as first:
        assert not any(folder.exists() for folder in dead)
        first.write_text("first")
        with replacing(tmp_path / "second.txt") as second:
            second.write_text("second")
        assert first.read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == [mine.name, "first.txt", "second.txt"]


def test_the_files_of_a_spec_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("top.py", "pack/__init__.py", "pack/nets.py", "values.json"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("raise SystemExit('imported')")
    assert spec_files("top.py:net?file=values.json&n=3") == [Path("top.py"), Path("values.json")]
    assert spec_files("pack.nets:net") == [tmp_path / "pack/__init__.py", tmp_path / "pack/nets.py"]
    assert spec_files("digits") == [Path("digits")]
    assert tmp_path / "top.py" in spec_files("top:net")
