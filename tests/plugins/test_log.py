"""The log of a fusion: every step through the logger ``mergeot``, on standard error only where asked for."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import mergeot_executors
import mergeot_frontends
import mergeot_layers
import mergeot_log
import mergeot_matching
import mergeot_measures
import pytest
import torch
import typer
from nets import Mlp

from mergekit_ot import FusionResult, PluginManager, StepReport, fuse
from mergekit_ot.cli.app import build_app
from mergekit_ot.errors import RecipeError
from mergekit_ot.fusion.step_report import GroupReport
from mergekit_ot.transport.problem import Status

PLUGINS = (mergeot_executors, mergeot_layers, mergeot_matching, mergeot_measures, mergeot_log)


@pytest.fixture(autouse=True)
def _quiet_before_and_after():
    mergeot_log.show_on_stderr("")
    yield
    mergeot_log.show_on_stderr("")


def fused(solver: str) -> FusionResult:
    torch.manual_seed(0)
    # Where a front end is asked for, an average has steps as well.
    options = {"front_end": "export", "manager": PluginManager([*PLUGINS, mergeot_frontends])}
    return fuse([Mlp(), Mlp()], solver=solver, example_inputs=torch.randn(2, 6), **options)


def test_every_step_of_every_sweep_is_logged_with_its_cost_and_status(caplog):
    with caplog.at_level(logging.INFO, "mergeot"):
        result = fused("weight-matching")
    lines = [record.getMessage() for record in caplog.records if record.name == "mergeot"]
    # The last sweep is the one in which nothing changes, so the costs are those of the result.
    for group in result.groups:
        assert any(
            f"group {group.name} of {group.size} neurons, cost {group.cost:.6g}, converged" in line for line in lines
        )
    sweeps = [line.split(",")[0] for line in lines]
    assert sweeps[:2] == ["sweep 1"] * 2
    assert sweeps[-1] == f"sweep {len(lines) // 2}"
    assert len(lines) >= 4
    assert all("of 2: " in line for line in lines)


def test_groups_without_a_cost_and_other_statuses_are_told(caplog):
    groups = (GroupReport("a:0", 3, None, Status.CONVERGED, "wb"), GroupReport("b:0", 4, 0.5, Status.MAX_STEPS, "wb"))
    with caplog.at_level(logging.DEBUG, "mergeot"):
        mergeot_log.mergeot_step_done(StepReport(1, 4, 2, groups))
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "sweep 3, step 2 of 4: group a:0 of 3 neurons, no cost, converged"),
        ("DEBUG", f"group a:0: {Status.CONVERGED.value}"),
        ("INFO", "sweep 3, step 2 of 4: group b:0 of 4 neurons, cost 0.5, max_steps"),
        ("DEBUG", f"group b:0: {Status.MAX_STEPS.value}"),
    ]


@pytest.mark.parametrize(("level", "advice"), [("info", False), ("DEBUG", True)])
def test_the_variable_shows_the_log_on_stderr_once_however_often_commands_run(monkeypatch, capsys, level, advice):
    monkeypatch.setenv("MERGEOT_LOG", level)
    for _ in range(2):
        build_app(PluginManager(PLUGINS))
    fused("average")
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = [line for line in shown.err.splitlines() if "step 1 of 2" in line]
    assert lines == ["mergeot: sweep 1, step 1 of 2: group layers.0.weight:0 of 8 neurons, no cost, converged"]
    assert (Status.CONVERGED.value in shown.err) is advice


@pytest.mark.parametrize("value", [None, ""])
def test_without_the_variable_nothing_is_shown(monkeypatch, capsys, value):
    if value is None:
        monkeypatch.delenv("MERGEOT_LOG", raising=False)
    else:
        monkeypatch.setenv("MERGEOT_LOG", value)
    build_app(PluginManager(PLUGINS))
    fused("average")
    assert capsys.readouterr() == ("", "")


def test_an_unknown_level_is_an_error_that_lists_the_levels(monkeypatch):
    monkeypatch.setenv("MERGEOT_LOG", "inform")
    with pytest.raises(RecipeError, match=r"MERGEOT_LOG: Unknown level 'inform'\. Did you mean 'info'\? Known: debug"):
        mergeot_log.mergeot_commands(app=typer.Typer())


def test_nothing_heavy_is_imported():
    code = (
        "import json, sys, mergeot_log; mergeot_log.show_on_stderr('info'); "
        "print(json.dumps([m for m in ('torch', 'numpy', 'networkx') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
