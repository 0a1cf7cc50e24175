"""What a plugin may do wrong: its distribution or module is named, and the rest works or stops with advice."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from mergekit_ot import (
    AbstractBarycenterSolver,
    AbstractNodeMeasure,
    Coupling,
    NeuronMeasure,
    Permutation,
    Plan,
    PluginManager,
    fuse,
    hookimpl,
    load_checkpoint,
    save_checkpoint,
)
from mergekit_ot.cli.app import build_app
from mergekit_ot.errors import PluginError, SolverError
from mergekit_ot.hooks.loading import SECONDS_VARIABLE, imported

IDENTITY = Permutation(torch.arange(6))


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))


def manager_with(**hooks: object) -> PluginManager:
    manager = PluginManager.load()
    manager.register(SimpleNamespace(**{name: hookimpl(hook) for name, hook in hooks.items()}), "odd")
    return manager


def fused_with(solver: AbstractBarycenterSolver | str, manager: PluginManager | None = None, **options: object):
    return fuse([net(0), net(1)], solver=solver, example_inputs=torch.randn(2, 3), manager=manager, **options)


@dataclass(frozen=True)
class Odd(AbstractBarycenterSolver):
    """Returns what it is told to."""

    name = "odd"
    returned: object = None

    def find(self, problem):
        return self.returned(problem) if callable(self.returned) else self.returned


def overwrites(problem) -> tuple[Coupling, ...]:
    problem.measures[1].support[0] += 1
    return IDENTITY, IDENTITY


def exchanges(problem) -> tuple[Coupling, ...]:
    support = problem.measures[1].support
    support.copy_(support.flip(0))
    return IDENTITY, IDENTITY


NEGATIVE = torch.eye(6) / 6 + torch.tensor([[-0.1, 0.1], [0.1, -0.1]]).repeat(3, 3)

WRONG_SOLUTIONS = {
    "nothing": (None, "returned a NoneType"),
    "a number": (3, "returned a int"),
    "no couplings": ((IDENTITY, "1"), "returned a tuple"),
    "one too few": ((IDENTITY,), "couplings of sizes"),
    "too large": ((IDENTITY, Permutation(torch.arange(7))), "couplings of sizes"),
    "out of range": ((IDENTITY, Permutation(torch.arange(6) + 1)), "takes a neuron twice"),
    "twice one neuron": (
        (IDENTITY, Permutation(torch.zeros(6).long())),
        "takes a neuron twice",
    ),
    "negative masses": ((IDENTITY, Plan(NEGATIVE)), "negative mass"),
    "wrong marginals": ((IDENTITY, Plan(torch.eye(6))), "misses its marginals"),
    "NaN": ((IDENTITY, Plan(torch.full((6, 6), torch.nan))), "misses its marginals by nan"),
    "fractions": ((IDENTITY, Permutation(torch.arange(6) / 2)), "not a list of whole numbers"),
    "an error": (lambda problem: 1 / 0, "ZeroDivisionError: division by zero"),
    "an exit": (lambda problem: exit(3), "SystemExit: 3"),
    "its input changed": (overwrites, "the measure of source 1 was changed in place"),
    "its input exchanged": (exchanges, "the measure of source 1 was changed in place"),
}


@pytest.mark.parametrize("what", WRONG_SOLUTIONS)
def test_a_solver_that_breaks_its_contract_is_named_with_its_group(what):
    returned, reason = WRONG_SOLUTIONS[what]
    with pytest.raises(SolverError) as told:
        fused_with(Odd(returned))
    assert "Solver 'odd'" in str(told.value)
    assert "'0.weight:0'" in str(told.value)
    assert reason in str(told.value)


def test_the_module_of_what_raises_is_named():
    with pytest.raises(SolverError, match=r"of module '.*test_plugin_blame'"):
        fused_with(Odd(lambda problem: 1 / 0))


def odd_measure(returned):
    class Measure(AbstractNodeMeasure):
        def measure(self, view):
            return returned(view)

    return manager_with(mergeot_node_measures=lambda: {"odd": Measure})


GOOD_MEASURE = NeuronMeasure.uniform(torch.randn(6, 2))
WRONG_MEASURES = {
    "nothing": (lambda view: None, "TypeError"),
    "no measure": (lambda view: (GOOD_MEASURE, 3), "a int is no NeuronMeasure"),
    "one too few": (lambda view: (GOOD_MEASURE,), "1 measures for 2 sources"),
    "other columns": (lambda view: (GOOD_MEASURE, NeuronMeasure.uniform(torch.randn(6, 3))), "columns"),
    "negative": (lambda view: (GOOD_MEASURE, NeuronMeasure(torch.ones(6, 2), 1 - torch.arange(6))), "negative"),
    "too much": (lambda view: (GOOD_MEASURE, NeuronMeasure(torch.ones(6, 2), torch.ones(6))), "sum to 6"),
    "wrong shape": (lambda view: (GOOD_MEASURE, NeuronMeasure(torch.ones(6), torch.ones(6))), "shape"),
    "an error": (lambda view: 1 / 0, "ZeroDivisionError"),
}


@pytest.mark.parametrize("what", WRONG_MEASURES)
def test_a_measure_that_breaks_its_contract_is_named_with_its_group(what):
    returned, reason = WRONG_MEASURES[what]
    with pytest.raises(PluginError, match=r"(?s)Measure 'Measure' on group '0\.weight:0'.*" + reason):
        fused_with("wb", odd_measure(returned), measure="odd")


@pytest.mark.parametrize("kind", ["solver", "measure", "repair", "executor"])
@pytest.mark.parametrize("thing", [3, dict, len], ids=str)
def test_what_is_no_class_of_its_kind_is_refused_by_its_plugin(kind, thing):
    hook = {"measure": "mergeot_node_measures"}.get(kind, f"mergeot_{kind}s")
    manager = manager_with(**{hook: lambda: {"odd": thing}})
    with pytest.raises(PluginError, match=f"Plugin 'odd' registers {kind} 'odd', which is no subclass of Abstract"):
        fused_with(**{"solver": "wb", kind: "odd"}, manager=manager)


def test_a_symmetry_that_is_none_is_refused_by_its_plugin():
    with pytest.raises(PluginError, match="Plugin 'odd' registers the symmetry 'odd'"):
        fused_with("wb", manager_with(mergeot_symmetries=lambda: {"odd": dict}))


def test_an_observer_that_raises_is_told_once_and_stops_nothing():
    seen = []
    manager = manager_with(mergeot_step_done=lambda report: seen.append(report) or 1 / 0)
    deep = [nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)) for _ in range(2)]
    with pytest.warns(UserWarning, match=r"'odd' has a broken hook.*ZeroDivisionError") as told:
        result = fuse(deep, solver="wb", example_inputs=torch.randn(2, 3), manager=manager)
    assert len(result.groups) == 2
    assert len(seen) == 1
    assert sum("broken hook" in str(warning.message) for warning in told) == 1


@pytest.mark.parametrize("hook", ["mergeot_load_checkpoint", "mergeot_check_output", "mergeot_save_checkpoint"])
@pytest.mark.parametrize("broken", [lambda path: 1 / 0, lambda path: exit(3)], ids=["raises", "exits"])
def test_a_format_that_raises_is_named(tmp_path: Path, hook, broken):
    manager, path = manager_with(**{hook: broken}), tmp_path / "net.pt"
    save_checkpoint(net(), path)
    is_reader = hook == "mergeot_load_checkpoint"
    use = functools.partial(load_checkpoint, path) if is_reader else functools.partial(save_checkpoint, net(), path)
    with pytest.raises(PluginError, match="of plugin 'odd'"):
        use(manager=manager)
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt"]


@pytest.mark.parametrize("returned", [{}, 3, "state"], ids=str)
def test_a_format_that_returns_no_checkpoint_is_told(tmp_path: Path, returned):
    save_checkpoint(net(), tmp_path / "net.pt")
    with pytest.raises(PluginError, match="not a Checkpoint or None"):
        load_checkpoint(tmp_path / "net.pt", manager=manager_with(mergeot_load_checkpoint=lambda path: returned))


def command(name: str):
    def hook(app: typer.Typer) -> None:
        @app.command("first")
        def first() -> None:
            print("first")

        @app.command(name)
        def second() -> None:
            print("replaced")

    return hook


def told_of(manager: PluginManager, *arguments: str):
    return CliRunner().invoke(build_app(manager), list(arguments))


def test_a_plugin_that_replaces_a_command_is_left_out_with_all_its_commands():
    manager = manager_with(mergeot_commands=command("fuse"))
    with pytest.warns(UserWarning, match="'odd' has a broken hook .*its command 'fuse' is taken"):
        assert "replaced" not in told_of(manager, "fuse", "--help").output
    with pytest.warns(UserWarning, match="is taken"):
        assert told_of(manager, "first").exit_code == 2


def test_a_plugin_that_replaces_the_program_itself_is_left_out():
    def hook(app: typer.Typer) -> None:
        app.registered_commands.clear()

    with pytest.warns(UserWarning, match="'mergeot' is taken"):
        assert "Fuse two or more" in told_of(manager_with(mergeot_commands=hook), "fuse", "--help").output


@pytest.mark.parametrize("broken", [lambda app: 1 / 0, lambda app: exit(3)], ids=["raises", "exits"])
def test_a_plugin_whose_commands_raise_is_left_out(broken):
    with pytest.warns(UserWarning, match="'odd' has a broken hook"):
        assert told_of(manager_with(mergeot_commands=broken), "plugins", "--json").exit_code == 0


def test_commands_of_their_own_are_kept():
    assert told_of(manager_with(mergeot_commands=command("second")), "second").output == "replaced\n"


def test_a_name_that_is_no_text_costs_the_hook():
    manager = manager_with(mergeot_repairs=lambda: {3: "home:Repair"})
    with pytest.warns(UserWarning, match="returned the name 3, which is no text"):
        assert "refit" in manager.repairs


@pytest.mark.parametrize("stop", [SystemExit(3), KeyboardInterrupt(), OSError("library is missing")], ids=repr)
def test_whatever_an_import_raises_is_a_plugin_error(stop):
    def load() -> None:
        raise stop

    with pytest.raises(PluginError, match=type(stop).__name__):
        imported(load)


def test_ctrl_c_during_an_import_is_the_users():
    with pytest.raises(KeyboardInterrupt):
        imported(lambda: os.kill(os.getpid(), signal.SIGINT))


def test_an_import_that_hangs_is_stopped(monkeypatch):
    monkeypatch.setenv(SECONDS_VARIABLE, "0.1")
    with pytest.raises(PluginError, match=f"longer than 0.1 s .*{SECONDS_VARIABLE}"):
        imported(lambda: time.sleep(30))
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_imports_in_another_thread_work():
    found = []
    thread = threading.Thread(target=lambda: found.append(imported(lambda: 3)))
    thread.start()
    thread.join()
    assert found == [3]


@pytest.mark.parametrize("text", ["", "-1", "0", "nan", "inf", "soon"])
def test_a_time_limit_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv(SECONDS_VARIABLE, text)
    with pytest.raises(PluginError, match=SECONDS_VARIABLE):
        imported(lambda: 3)
