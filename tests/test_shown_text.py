"""Names and files are shown so that nothing in them acts, and what is written names no folder of this machine."""

from __future__ import annotations

import io
import json
import re
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mergekit_ot import CheckpointError, trace_model
from mergekit_ot.cli import output
from mergekit_ot.cli.app import main
from mergekit_ot.pictures.dot import group_dot
from mergekit_ot.recipe import make_recipe
from mergekit_ot.report.markup import tag
from mergekit_ot.report.repeating import fuse_command
from mergekit_ot.sources.portable import portable_path, portable_spec, portable_text
from mergekit_ot.text import as_markdown, printable

# It clears the screen, begins a line, turns the direction, breaks tables, and is markup.
HOSTILE = "a\x1b[2J\r\nmergeot: \u202egnp|`x`<img src=x onerror=alert(1)>[y](javascript:1)\u2066\x07\x9b\udcff"
SOURCE = """
import torch
from torch import nn


class Hostile(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential()
        for name, layer in zip("NAMES".split("/"), (nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))):
            self.layers.add_module(name, layer)

    def forward(self, inputs):
        return self.layers(inputs)
"""
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Gives a way to run a command in a folder of its own; returns what it printed for the reader."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(*arguments: str, status: int = 0) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([*arguments])
        printed = capsys.readouterr()
        assert (stopped.value.code or 0) == status, printed.err
        return printed.err

    return run


def is_calm(printed: str) -> bool:
    """Whether text for a terminal holds lines of printed characters alone."""
    return all(line.isprintable() for line in printed.split("\n"))


@given(st.text(max_size=50))
def test_printable_text_is_on_one_line_and_stays_as_it_is(text: str) -> None:
    once = printable(text)
    assert once.isprintable()
    assert printable(once) == once
    assert len(printable(text * 1000)) < 70_000
    assert (once == text) == text.isprintable()


@given(st.text(alphabet="ab|`<>[]()_*\\&#~:/$.w\n ", max_size=30))
def test_markdown_shows_text_as_it_is(text: str) -> None:
    shown = as_markdown(text)
    assert "\n" not in shown
    assert not re.search(r"(?<!\\)(?:\\\\)*[|`<>\[\]*]", shown)
    assert re.sub(r"\\(_|[^\w\s])", r"\1", shown) == printable(text)


def test_markdown_leaves_plain_names_alone() -> None:
    assert as_markdown("rnn.weight_ih_l0:0, 6 neurons (a.pt)") == "rnn.weight_ih_l0:0, 6 neurons (a.pt)"
    assert as_markdown("https://x.y www.x.y") == "https:\\//x.y www\\.x.y"


def test_names_of_tensors_do_not_act_on_the_terminal(run: Run) -> None:
    torch.save({HOSTILE.replace("\udcff", ""): torch.ones(2, 3)}, "a.pt")
    said = run("check", "a.pt", "--arch", "torch.nn:Linear?in_features=3&out_features=2", status=1)
    assert is_calm(said)
    assert "a\\x1b[2J\\r\\nmergeot: \\u202egnp" in said


def test_names_of_files_do_not_act_on_the_terminal(run: Run) -> None:
    name = "x" + HOSTILE.replace("/", "").replace("\udcff", "") + ".pt"
    torch.save(nn.Linear(3, 2).state_dict(), "a.pt")
    Path(name).write_bytes(Path("a.pt").read_bytes())
    arch = ["--arch", "torch.nn:Linear?in_features=3&out_features=2", "--input-shape", "3"]
    for arguments, status in (
        (["fuse", name, "a.pt", "--solver", "average", *arch], 0),
        (["check", name], 1),
        (["check", name + "x"], 1),
        (["align", name, "a.pt", "-o", "aligned", *arch], 1),
        (["eval", name, "--data", f"{name}.npz", *arch[:2]], 1),
        (["check", "a.pt", name], 2),
        (["check", "a.pt", f"--{name}"], 2),
        ([name], 2),
    ):
        said = run(*arguments, status=status)
        assert is_calm(said.replace("\x1b[1m", "").replace("\x1b[0m", "")), (arguments, said)
        assert "\\x1b[2J" in said


def test_names_of_groups_do_not_act_on_the_terminal(run: Run) -> None:
    names = HOSTILE.replace(".", "").replace("/", "").replace("\udcff", "") + "/b\x1b[2J/c\u202e"
    Path("nets.py").write_text(SOURCE.replace('"NAMES"', ascii(names)), encoding="utf-8")
    namespace: dict = {}
    exec(compile(Path("nets.py").read_text(encoding="utf-8"), "nets.py", "exec"), namespace)
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(namespace["Hostile"]().state_dict(), f"{seed}.pt")
    arch = ["--arch", "nets.py:Hostile", "--input-shape", "4"]
    assert is_calm(run("fuse", "0.pt", "1.pt", "--report", "report", *arch))
    assert is_calm(run("inspect", "0.pt", "--svg", "g.svg", "--modules", "m.svg", "--dot", "g.dot", *arch))
    for picture in ("g.svg", "m.svg"):
        root = ElementTree.parse(picture).getroot()
        assert {element.tag.rpartition("}")[2] for element in root.iter()} <= {
            *("svg", "style", "defs", "marker", "path", "rect", "text", "title", "g")
        }
    for file in (*Path("report").glob("report.*"), Path("g.svg"), Path("m.svg"), Path("g.dot")):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", file.read_text("utf-8")), file
    assert "<img src=x" not in Path("report/report.html").read_text("utf-8")
    rows = [line for line in Path("report/report.md").read_text("utf-8").splitlines() if line.startswith("| ")]
    assert len(rows) >= 2
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6}


def test_a_name_of_ten_megabytes_makes_a_short_message(run: Run) -> None:
    torch.save({"w" * 10_000_000: torch.ones(2, 3)}, "a.pt")
    assert len(run("check", "a.pt", "--arch", "torch.nn:Linear?in_features=3&out_features=2", status=1)) < 10_000
    assert len(str(CheckpointError("long name " * 1_000_000 + "Do this."))) < 10_000
    assert str(CheckpointError("long name " * 1_000_000 + "Do this.")).endswith("Do this.")


def test_a_table_shows_what_looks_like_markup(capsys: pytest.CaptureFixture[str]) -> None:
    output.show_table([{"name": "[red]x\x1b[2J", "size": 3}], title="Order of [bold]a.pt\n")
    printed = capsys.readouterr().err
    assert "[red]x\\x1b[2J" in printed
    assert "Order of [bold]a.pt\\n" in printed


def test_paths_on_standard_output_are_for_programs_unless_a_terminal_reads_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output.show_path("a\x1b[2J.pt")
    assert capsys.readouterr().out == "a\x1b[2J.pt\n"
    raw = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="utf-8"))
        output.show_path("a\udcff.pt")
        assert raw.getvalue() == b"a\xff.pt\n"
    monkeypatch.setattr("sys.stdout", Terminal())
    output.show_path("a\x1b[2J.pt")
    assert output.sys.stdout.getvalue() == "a\\x1b[2J.pt\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_commands_that_repeat_a_fusion_stay_on_one_line_and_are_read_back() -> None:
    names = ["a\nb'c\\.pt", "x\x1b[2J\u202e\udcff.pt", "it's.pt"]
    command = fuse_command(make_recipe(models=names), "cpu")
    assert command is not None
    assert command.isprintable()
    printed = command.replace("mergeot fuse", "printf '%s\\0'")
    read = subprocess.run(["bash", "-c", printed], capture_output=True, check=True).stdout
    assert [name.encode("utf-8", "surrogateescape") for name in names] == read.split(b"\0")[:3]


def test_graphviz_reads_a_name_as_a_name() -> None:
    net = nn.Sequential()
    net.add_module("a\\", nn.Linear(2, 3))
    net.add_module('b" URL="javascript:1', nn.Linear(3, 2))
    drawn = group_dot(trace_model(net, torch.randn(2, 2)))
    for line in drawn.splitlines()[2:-1]:
        outside = re.sub(r'"(?:[^"\\]|\\.)*"', '""', line)
        assert re.fullmatch(r'  "" (?:-> "" )?\[label=""\];', outside), line


def test_html_shows_what_is_not_printed() -> None:
    assert tag("td", "a\x1b\u202e<b>", title="\x07\"'") == '<td title="\\x07&quot;&#x27;">a\\x1b\\u202e&lt;b&gt;</td>'


def contents(folder: Path) -> dict[str, bytes]:
    """Returns what stands in the files of a folder, and in the members of those that are archives."""
    found: dict[str, bytes] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        found[file.name] = file.read_bytes()
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                found.update({f"{file.name}: {name}": archive.read(name) for name in archive.namelist()})
    return found


def test_what_is_written_names_no_folder_and_no_user(run: Run, tmp_path: Path) -> None:
    home = tmp_path / "home-of-somebody"
    home.mkdir()
    (home / "nets.py").write_text(SOURCE.replace("NAMES", "a/b/c"), encoding="utf-8")
    namespace: dict = {}
    exec(compile((home / "nets.py").read_text(encoding="utf-8"), "nets.py", "exec"), namespace)
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(namespace["Hostile"]().state_dict(), home / f"{seed}.pt")
    np.savez(home / "data.npz", x=np.random.default_rng(0).normal(size=(8, 4)), y=np.arange(8) % 3)
    models = [str(home / "0.pt"), str(home / "1.pt")]
    arch = ["--arch", f"{home / 'nets.py'}:Hostile", "--input-shape", "4"]
    target = ["--target", f"{home / 'nets.py'}:Hostile"]
    data = ["--data", f"{home / 'data.npz'}?batch=4"]
    work = Path.cwd()
    run("fuse", *models, "-o", str(work / "f.pt"), "--report", str(work / "report"), *arch, *target, *data)
    run("fuse", *models, "-o", str(work / "f.safetensors"), *arch)
    run("align", *models, "-o", str(work / "aligned"), *arch)
    run("inspect", models[0], "--svg", "g.svg", "--modules", "m.svg", "--dot", str(work / "g.dot"), *arch)
    run("barrier", *models, "--points", "3", "--plot", str(work / "b.svg"), *arch, *data)
    run("barrier", *models, "--points", "3", "--plot", str(work / "b.png"), *arch, *data)
    written = contents(work)
    assert len(written) > 15
    for name, content in written.items():
        assert b"somebody" not in content, name
        assert str(tmp_path).encode() not in content, name
        assert b"/home-" not in content, name
    provenance = json.loads((work / "f.pt.json").read_text(encoding="utf-8"))["provenance"]
    assert provenance["arch"] == provenance["target"] == "nets.py:Hostile"
    said = written["recipe.yaml"].decode()
    assert "- 0.pt\n" in said
    assert "data: data.npz?batch=4\n" in said
    assert "output: f.pt\n" in said
    assert "mergeot fuse --recipe report/recipe.yaml" in written["report.md"].decode()
    assert "without their folders" in written["report.html"].decode()


def test_relative_names_stay_as_they_were_typed() -> None:
    for name in ("a.pt", "../models/a.pt", "./a.pt", "~/a.pt"):
        assert portable_path(name) == name
    assert portable_path(f"{Path.cwd()}/../somebody/a.pt") == "a.pt"
    assert portable_spec("pkg.module:name?a=1&b=") == "pkg.module:name?a=1&b="
    assert portable_spec("/x/data.npz?root=%2Fhome%2Fme%2Fd&mean=0.1") == "data.npz?root=d&mean=0.1"
    assert (
        portable_text("loss/accuracy of 1/2, at https://x.y/z: 3 / 4")
        == "loss/accuracy of 1/2, at https://x.y/z: 3 / 4"
    )
    assert portable_text('File "/home/me/x/net.py", line 3') == 'File "net.py", line 3'


def test_warnings_are_shown_calmly(capsys: pytest.CaptureFixture[str]) -> None:
    output.show_warning("two\nlines \x1b[31m")
    assert capsys.readouterr().err == "warning: two\\nlines \\x1b[31m\n"


def test_tracebacks_of_mistakes_are_shown_calmly(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for debug in ("0", "1"):
        monkeypatch.setenv("MERGEOT_DEBUG", debug)
        output.report_bug(ValueError("of\x1b[2J a name\u202e"))
        printed = capsys.readouterr().err
        assert is_calm(printed)
        assert "ValueError: of\\x1b[2J a name\\u202e" in printed
