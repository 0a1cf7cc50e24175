"""The plugin door: a distribution of its own gets in through an entry point, and whoever is broken is named."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mergekit_ot import FusionResult, fuse, hookimpl
from mergekit_ot.errors import PluginError, RecipeError
from mergekit_ot.hooks.manager import PluginManager

LOOPBACK = Path(__file__).parent / "loopback"
# What the loopback does not bring: it has no executor.
NEEDED = "loopback,mergeot_executors"

Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path, monkeypatch) -> Install:
    """Gives a function that makes a distribution importable, as an installer would, without one."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("MERGEOT_PLUGINS", raising=False)

    def installed(distribution: str, entry_points: str) -> None:
        folder = tmp_path / f"{distribution.replace('-', '_')}-0.0.1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.0.1\n")
        (folder / "entry_points.txt").write_text(f"[mergekit_ot]\n{entry_points}\n")

    return installed


@pytest.fixture
def loopback(install, monkeypatch) -> None:
    """Installs the loopback distribution by what its own pyproject.toml says."""
    project = tomllib.loads((LOOPBACK / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["mergekit_ot"]
    install(project["name"], "\n".join(f"{name} = {module}" for name, module in points.items()))
    monkeypatch.syspath_prepend(str(LOOPBACK))


def _mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)).double()


def _reordered(model: nn.Module) -> nn.Module:
    """Returns the same function with its hidden neurons in another order."""
    moved = _mlp(0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for own, reader, size in (("0", "2", 8), ("2", "4", 7)):
        order = torch.arange(size).roll(3)
        state[f"{own}.weight"] = state[f"{own}.weight"][order]
        state[f"{own}.bias"] = state[f"{own}.bias"][order]
        state[f"{reader}.weight"] = state[f"{reader}.weight"][:, order]
    moved.load_state_dict(state)
    return moved


def _fuse(models: list[nn.Module], solver: str, manager: PluginManager) -> FusionResult:
    inputs = torch.zeros(2, 5, dtype=torch.float64)
    return fuse(models, solver=solver, example_inputs=inputs, device="cpu", manager=manager)


@pytest.mark.usefixtures("loopback")
def test_fusion_runs_on_the_loopback_alone(monkeypatch):
    monkeypatch.setenv("MERGEOT_PLUGINS", NEEDED)
    manager = PluginManager.load()
    assert not manager.broken
    assert set(manager.solvers) == {"loopback"}
    assert set(manager.node_measures) == {"loopback-weights"}
    assert {entry.plugin for entry in manager.node_rules.values()} == {"loopback"}
    source = _mlp(0)
    result = _fuse([source, _reordered(source)], "loopback", manager)
    inputs = torch.randn(20, 5, dtype=torch.float64)
    torch.testing.assert_close(result.model()(inputs), source(inputs), rtol=0, atol=1e-12)
    assert [report.size for report in result.groups] == [8, 7]


@pytest.mark.usefixtures("loopback")
def test_loopback_gives_what_its_original_gives(monkeypatch):
    monkeypatch.setenv("MERGEOT_PLUGINS", NEEDED)
    models = [_mlp(1), _mlp(2)]
    through = _fuse(models, "loopback", PluginManager.load()).state
    monkeypatch.setenv("MERGEOT_PLUGINS", "mergeot_layers,mergeot_measures,mergeot_wasserstein,mergeot_executors")
    direct = _fuse(models, "wb", PluginManager.load()).state
    assert through.keys() == direct.keys()
    assert all(torch.equal(through[name], direct[name]) for name in direct)


@pytest.mark.usefixtures("loopback")
def test_name_that_is_left_out_is_not_found(monkeypatch):
    monkeypatch.setenv("MERGEOT_PLUGINS", NEEDED)
    with pytest.raises(RecipeError, match=r"'wb'.*Known: loopback"):
        _fuse([_mlp(1), _mlp(2)], "wb", PluginManager.load())


@pytest.mark.usefixtures("loopback")
def test_loopback_is_listed_with_its_distribution(monkeypatch):
    monkeypatch.setenv("MERGEOT_PLUGINS", "loopback")
    (row,) = PluginManager.load().describe()
    assert (row.name, row.distribution, row.version) == ("loopback", "mergeot-loopback", "0.0.1")
    assert set(row.hooks) == {"mergeot_node_rules", "mergeot_node_measures", "mergeot_solvers"}
    assert row.registered["solver"] == ("loopback",)


@pytest.mark.usefixtures("loopback")
def test_loopback_beside_its_original_conflicts_loudly(monkeypatch):
    monkeypatch.setenv("MERGEOT_PLUGINS", "loopback,mergeot_layers")
    with pytest.raises(PluginError, match=r"'loopback' and 'mergeot_layers' both register rule 'aten\."):
        _ = PluginManager.load().node_rules


def test_broken_entry_point_is_named_and_the_host_goes_on(install):
    install("broken-distribution", "broken = mergeot_module_that_does_not_exist")
    with pytest.warns(UserWarning, match="Plugin 'broken' of distribution 'broken-distribution' cannot be loaded"):
        manager = PluginManager.load()
    assert "mergeot_module_that_does_not_exist" in manager.broken["broken"]
    assert "wb" in manager.solvers


def test_plugin_that_raises_on_import_does_not_stop_the_command_line(install, tmp_path):
    install("raising-distribution", "raising = mergeot_raising")
    (tmp_path / "mergeot_raising.py").write_text("raise RuntimeError('out of cheese')\n")
    places = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(place for place in places if place)}
    code = "from mergekit_ot.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "plugins"], env=environment, capture_output=True, text=True, check=False
    )
    told = " ".join((done.stderr + done.stdout).split())
    assert done.returncode == 0
    assert "raising-distribution" in told
    assert "out of cheese" in told
    assert "mergeot_wasserstein" in told
    assert "Traceback" not in told


def test_misspelt_hook_is_asked_about():
    plugin = SimpleNamespace(__name__="typo", mergeot_solver=hookimpl(lambda: {"mine": "home:Solver"}))
    with pytest.warns(UserWarning, match=r"'typo'.*'mergeot_solver'.*Did you mean 'mergeot_solvers'"):
        manager = PluginManager([plugin])
    assert not manager.solvers


def test_two_plugins_that_claim_one_name_are_both_named():
    plugins = [
        SimpleNamespace(__name__=name, mergeot_solvers=hookimpl(lambda: {"same": "home:Solver"}))
        for name in ("one", "other")
    ]
    with pytest.raises(PluginError, match=r"'(one|other)' and '(one|other)' both register solver 'same'"):
        _ = PluginManager(plugins).solvers


def test_plugins_of_one_name_in_two_distributions_are_both_named(install, tmp_path):
    (tmp_path / "mergeot_empty.py").write_text("")
    install("first-distribution", "twice = mergeot_empty")
    install("second-distribution", "twice = mergeot_empty")
    with pytest.raises(PluginError, match=r"(?=.*first-distribution)(?=.*second-distribution).*'twice'"):
        PluginManager.load()


def test_import_string_that_leads_nowhere_names_the_plugin():
    plugin = SimpleNamespace(__name__="stale", mergeot_solvers=hookimpl(lambda: {"gone": "mergekit_ot.errors:Gone"}))
    with pytest.raises(PluginError, match="'stale' registers 'gone'"):
        PluginManager([plugin]).get("solver", "gone")


def test_unknown_name_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("MERGEOT_PLUGINS", "mergeot_layers, mergeot_wassertein")
    with pytest.raises(PluginError, match=r"MERGEOT_PLUGINS.*'mergeot_wassertein'.*Did you mean 'mergeot_wasserstein'"):
        PluginManager.load()


def test_unknown_solver_is_refused_with_the_nearest_name(monkeypatch):
    monkeypatch.setenv("MERGEOT_PLUGINS", "mergeot_matching")
    with pytest.raises(RecipeError, match="Did you mean 'weight-matching'"):
        PluginManager.load().get("solver", "weight_matching")
