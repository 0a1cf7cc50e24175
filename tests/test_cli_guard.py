"""The guard on the command line: exit status 1 and no file, and the line that says how much was aligned."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_cli import Run, run  # noqa: F401
from torch import nn

from mergekit_ot import EinRule, PluginManager, hookimpl
from mergekit_ot.hooks import manager as plugin_manager

_NETS = """
import torch
from torch import nn

class Summed(nn.Module):
    def forward(self, x):
        return torch.cumsum(x, 1)

def summed():
    return nn.Sequential(nn.Linear(4, 6), Summed(), nn.ReLU(), nn.Linear(6, 3))
"""
_SHAPE = ("--arch", "summed.py:summed", "--input-shape", "4")


@pytest.fixture
def summed(run: Run) -> Run:  # noqa: F811
    Path("summed.py").write_text(_NETS)
    for name in "cd":
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.ReLU(), nn.Linear(6, 3))
        torch.save(net.state_dict(), f"{name}.pt")
    return run


@pytest.fixture
def lying(summed: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A plugin claims that the neurons under a running sum may change places."""
    manager, table = PluginManager.load(), {"module:Summed": EinRule("b n -> b n", ("input0",))}
    manager.register(SimpleNamespace(mergeot_node_rules=hookimpl(lambda: table)), "lying")
    monkeypatch.setattr(plugin_manager, "default_manager", lambda: manager)
    return summed


@pytest.mark.parametrize(
    "command",
    [
        ("fuse", "c.pt", "d.pt", "-o", "out.pt", "--report", "out", *_SHAPE),
        ("align", "c.pt", "d.pt", "-o", "out", *_SHAPE),
        ("barrier", "c.pt", "d.pt", "--align", "wb", "--data", "data.npz", "--plot", "out.svg", *_SHAPE[:2]),
    ],
    ids=["fuse", "align", "barrier"],
)
def test_another_function_is_never_written_or_drawn(lying: Run, command: tuple[str, ...]) -> None:
    message = lying.fails(*command)
    assert "'d.pt', moved into the fused order, computes something else" in message
    assert "part first at module '1' (aten.cumsum" in message
    assert list(Path().glob("out*")) == []


@pytest.mark.parametrize("command", [("fuse", "-o", "out.pt"), ("fuse", "--dry-run"), ("align", "-o", "out")])
def test_nothing_aligned_is_exit_status_one(summed: Run, command: tuple[str, ...]) -> None:
    message = summed.fails(command[0], "c.pt", "d.pt", *command[1:], *_SHAPE)
    assert "Nothing can be aligned in 'c.pt'" in message
    assert "aten.cumsum" in message
    assert list(Path().glob("out*")) == []


def test_an_average_is_no_alignment_and_says_so(summed: Run) -> None:
    summed("fuse", "c.pt", "d.pt", "-o", "out.pt", "--solver", "average", *_SHAPE)
    assert "taken as they stand: nothing was aligned" in summed.err
    # Nothing is traced for it, so that how many groups there are is not known, and that is said instead.
    assert "No neuron group was looked for: an average needs none." in summed.err
    assert Path("out.pt").exists()


def test_the_last_line_says_how_much(run: Run) -> None:  # noqa: F811
    line = "2 of 2 neuron groups aligned, no weight pinned."
    run("fuse", "a.pt", "b.pt", *run.arch, "--input-shape", "4")
    assert "The aligned sources compute what the sources compute (largest relative error " in run.err
    assert line in run.err
    run("fuse", "a.pt", "b.pt", *run.arch, "--input-shape", "4", "--dry-run")
    assert line in run.err
    run("fuse", "a.pt", "a.pt", *run.arch, "--input-shape", "4", "--report", "report")
    assert "nothing had to move" in run.err
    assert "compute what the sources compute" not in run.err
    assert f"nothing had to move. {line}" in Path("report/report.html").read_text()
    content = run.json("align", "a.pt", "b.pt", *run.arch, "--input-shape", "4", "-o", "aligned")
    assert content["outputs"][0]["aligned_groups"] == content["outputs"][0]["neuron_groups"] == 2
    run("align", "a.pt", "b.pt", *run.arch, "--input-shape", "4", "-o", "aligned")
    assert line in run.err
