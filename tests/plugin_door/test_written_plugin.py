"""The plugin that docs/how-to/writing-plugins.md writes: its code, as it stands on the page, does what it says."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from typer import Typer
from typer.testing import CliRunner

from mergekit_ot import ArchitectureError, check_model, fuse, load_checkpoint, save_checkpoint
from mergekit_ot.hooks.manager import PluginManager, default_manager
from mergekit_ot.sources.datasets import resolve_data
from mergekit_ot.sources.reading import read_sources
from mergekit_ot.sources.specs import resolve_architecture
from mergekit_ot.testing import check_solver

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "writing-plugins.md"
MODULE = "written_plugin"
NEEDED = ("mergeot_layers", "mergeot_measures", "mergeot_executors")


@pytest.fixture
def written(monkeypatch) -> Any:
    """Runs every block of the page in one module, in order."""
    module = ModuleType(MODULE)
    monkeypatch.setitem(sys.modules, MODULE, module)
    for match in re.finditer(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        code = compile(match[1], str(PAGE), "exec", flags=annotations.compiler_flag)
        exec(code, module.__dict__)
    return module


@pytest.fixture
def manager(written) -> PluginManager:
    manager = PluginManager([written])
    for name in NEEDED:
        manager.register(__import__(name), name)
    return manager


def test_page_writes_every_hook(manager):
    (row,) = [row for row in manager.describe() if row.name == MODULE]
    assert len(row.hooks) == 17


@pytest.mark.parametrize("is_scaled", [False, True])
def test_solver_keeps_the_contract(written, is_scaled):
    written.test_nearest_keeps_the_contract()
    check_solver(written.NearestSolver(is_scaled=is_scaled))


def test_rule_and_measure_keep_the_contract(written):
    written.test_distances_rule()
    written.test_directions_keep_the_contract()


def test_store_keeps_the_contract_and_is_found(written, manager, tmp_path):
    written.test_arrays_keep_the_contract(tmp_path)
    checkpoint = load_checkpoint(tmp_path, manager)
    assert type(checkpoint.state) is written.ArrayFolder
    assert torch.equal(checkpoint.state["weight"], torch.ones(3, 2))
    assert checkpoint.sha256 == checkpoint.state.digest()


def test_rule_finds_the_neurons_that_were_pinned_without_it(written, manager):
    report = check_model(written.Prototypes, torch.randn(3, 4), manager=manager)
    assert (report.preserved, report.certified) == (True, 2)
    assert check_model(written.Prototypes, torch.randn(3, 4), manager=default_manager()).certified == 0


def test_function_rule_pins_what_is_compared_in_order(written, manager):
    class RunningMaximum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.last(written.peaks(self.second(torch.relu(self.first(inputs))), 1))

    report = check_model(RunningMaximum, torch.randn(3, 4), manager=manager)
    assert report.preserved
    assert [row["name"] for row in report.rows if row["status"] == "certified"] == ["first.weight:0"]
    assert any("compared in order" in why for why in report.pins)


def test_solver_measure_executor_repair_and_observer_fuse_together(written, manager):
    torch.manual_seed(0)
    source, other = (written.perceptron(hidden=9).double() for _ in range(2))
    order = torch.randperm(9)
    other.load_state_dict(
        {
            "0.weight": source[0].weight[order],
            "0.bias": source[0].bias[order],
            "2.weight": source[2].weight[:, order],
            "2.bias": source[2].bias,
        }
    )
    inputs = torch.randn(10, 4, dtype=torch.float64)
    options: dict[str, Any] = {"solver": "nearest", "measure": "directions", "executor": "chatty", "device": "cpu"}
    result = fuse([source, other], example_inputs=inputs, manager=manager, **options)
    torch.testing.assert_close(result.model()(inputs), source(inputs))
    assert [(sweep, name) for sweep, name, _ in written.COSTS] == [(0, "0.weight:0")]
    bare = fuse([source, other], example_inputs=inputs, manager=manager, repair="without-biases", **options)
    assert bare.state["0.bias"].abs().sum() == 0
    assert torch.equal(bare.state["0.weight"], result.state["0.weight"])


def test_architecture_and_data_are_found_by_name(manager):
    model = resolve_architecture("perceptron?hidden=5", manager)()
    ((inputs, targets),) = resolve_data("noise?limit=7", manager)
    assert model(inputs).shape == (7, 2)
    assert targets.shape == (7,)


def test_checkpoint_format_round_trips(manager, tmp_path):
    state = {"weight": torch.arange(6.0).reshape(2, 3)}
    path = save_checkpoint(state, tmp_path / "net.npw", manager=manager)
    assert torch.equal(load_checkpoint(path, manager).state["weight"], state["weight"])


def test_command_is_added(manager):
    app = Typer()
    app.callback()(lambda: None)
    manager.hook.mergeot_commands(app=app)
    done = CliRunner().invoke(app, ["hello", "--name", "world"])
    assert done.stdout == "hello, world\n"


def test_library_and_guess_build_what_is_asked_for(manager, tmp_path):
    assert resolve_architecture("zoo:wide?classes=3", manager)()[2].weight.shape == (3, 64)
    network = manager.get("guess", "pair")
    torch.save(nn.ModuleDict({"encode": nn.Linear(3, 5), "decode": nn.Linear(5, 2)}).state_dict(), tmp_path / "a.pt")
    said: list[str] = []
    (source,) = read_sources([str(tmp_path / "a.pt")], (), manager, said.append)
    assert source.make().decode.weight.shape == (2, 5)
    assert any("guessed from names and shapes: a pair of maps (3, 5, 2)" in text for text in said)
    with pytest.raises(ArchitectureError, match="no pair"):
        network({"0.weight": (3, 4)}, is_confirmed=True, arguments={})
