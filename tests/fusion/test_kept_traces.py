"""Traces that are kept between runs: the same graphs, and a fresh trace wherever anything it depends on has changed."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import PLAIN, names, samples
from torch import Tensor, nn

from mergekit_ot import (
    ArchitectureError,
    FusionInputs,
    FusionOptions,
    ModelGraph,
    PluginManager,
    SourceModel,
    hookimpl,
    trace_model,
)
from mergekit_ot.api import fuse_with
from mergekit_ot.fusion.setup import FusionSetup
from mergekit_ot.graph.stored import StoredGraphError, graph_as_plain, graph_from_plain
from mergekit_ot.hooks.manager import default_manager
from mergekit_ot.hooks.preparing import prepare
from mergekit_ot.storage.kept import KeptRecords

INPUTS = torch.zeros(2, 4)
PARTS = ("layouts", "groups", "roles", "aliases", "buffers", "diagnostics", "values")


class Net(nn.Module):
    """A network that holds one more thing."""

    def __init__(self, held: object = 0, hidden: int = 8) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, hidden), nn.Linear(hidden, 2)
        self.held = held

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(inputs)))


@pytest.fixture
def traces(tmp_path: Path) -> KeptRecords:
    return KeptRecords(tmp_path / "kept")


class Traced:
    """Prepares fusions, and counts how often a module is really traced."""

    def __init__(self, traces: KeptRecords) -> None:
        self.traces = traces
        self.count = 0

    def trace(self, *arguments: Any, **named: Any) -> ModelGraph:
        self.count += 1
        return trace_model(*arguments, **named)

    def setup(self, make: Callable[[], nn.Module], inputs: object = INPUTS, **changed: Any) -> FusionSetup:
        manager = changed.pop("manager", None) or default_manager()
        state = make().state_dict()
        given: Any = FusionInputs([SourceModel("mine", make, state)], example_inputs=inputs)  # type: ignore[arg-type]
        return prepare(given, FusionOptions(**changed), manager, self.trace, traces=self.traces)

    def misses(self, make: Callable[[], nn.Module] = Net, inputs: object = INPUTS, **changed: Any) -> bool:
        """Whether a fusion had to trace."""
        before = self.count
        self.setup(make, inputs, **changed)
        return self.count > before


@functools.cache
def graph_of_net() -> ModelGraph:
    return trace_model(Net(), INPUTS)


class Quick(Traced):
    """Gives one graph for every trace, where only the number of traces matters."""

    def trace(self, *arguments: Any, **named: Any) -> ModelGraph:
        self.count += 1
        return graph_of_net()


@pytest.fixture
def traced(traces: KeptRecords) -> Traced:
    return Traced(traces)


@pytest.fixture
def quick(traces: KeptRecords) -> Traced:
    return Quick(traces)


def entry(traces: KeptRecords) -> Path:
    (path,) = traces.sizes()
    return path


def agrees(which: str, name: str, traced: Traced) -> None:
    sample = samples(which)[name]
    torch.manual_seed(0)
    model, inputs = sample.make(), sample.inputs()
    fresh = traced.setup(lambda: model, inputs).models.target_graph
    assert fresh.program is not None
    is_kept = bool(traced.traces.sizes())
    assert is_kept <= (fresh.program.front_end == "export")
    found = traced.setup(lambda: model, inputs).models.target_graph
    assert traced.count == (1 if is_kept else 2)
    for part in PARTS:
        ours, theirs = vars(found)[part], vars(fresh)[part]
        assert ours == theirs, part
        # Steps and names follow the order.
        assert list(ours) == list(theirs) if isinstance(ours, dict) else True
    assert list(found.operations.nodes(data=True)) == list(fresh.operations.nodes(data=True))
    assert list(found.operations.edges) == list(fresh.operations.edges)
    assert found.pin_sentences() == fresh.pin_sentences()
    assert found.diagnostics.sentences == fresh.diagnostics.sentences
    assert [node.name for node in found.program.graph.nodes] == [node.name for node in fresh.program.graph.nodes]
    assert traced.count == 2


@pytest.mark.parametrize(("which", "name"), names(*PLAIN)[::30])
def test_a_kept_graph_is_the_fresh_one(which: str, name: str, traced: Traced) -> None:
    agrees(which, name, traced)


@pytest.mark.slow
@pytest.mark.parametrize(("which", "name"), names(*PLAIN)[1::3])
def test_many_a_kept_graph_is_the_fresh_one(which: str, name: str, traced: Traced) -> None:
    agrees(which, name, traced)


@pytest.mark.parametrize(("solver", "kept"), [("wb", 1), ("weight-matching", 1), ("average", 0)])
def test_a_fusion_with_a_kept_trace_gives_the_same(solver: str, kept: int, traces: KeptRecords) -> None:
    torch.manual_seed(0)
    nets = [Net(), Net()]
    inputs = FusionInputs(nets, example_inputs=INPUTS)
    first, second = (fuse_with(inputs, FusionOptions(solver=solver), traces=traces) for _ in range(2))
    assert len(traces.sizes()) == kept  # an average needs no trace
    assert list(first.state) == list(second.state)
    assert all(torch.equal(first.state[name], second.state[name]) for name in first.state)
    assert (first.groups, first.warnings, first.notes) == (second.groups, second.warnings, second.notes)
    assert (first.check, first.extent) == (second.check, second.extent)


def test_what_needs_a_program_traces_then(traced: Traced) -> None:
    traced.setup(Net)
    graph = traced.setup(Net).models.target_graph
    assert traced.count == 1
    torch.manual_seed(0)
    net, inputs = Net(), torch.randn(3, 4)
    (outputs,) = graph.program.module(*graph.program.arguments(net.state_dict(), [inputs]))
    assert torch.allclose(outputs, net(inputs))
    assert graph.program is graph.program
    assert traced.count == 2


def test_a_trace_serves_what_it_does_not_depend_on(traced: Traced) -> None:
    assert traced.misses()
    assert not traced.misses()
    assert not traced.misses(inputs=torch.randn(2, 4))
    assert not traced.misses(solver="weight-matching", seed=7)


CHANGES: dict[str, dict[str, Any]] = {
    "shape of the inputs": {"inputs": torch.zeros(3, 4)},
    "type of the inputs": {"inputs": torch.zeros(2, 4, dtype=torch.float64)},
    "a setting": {"make": lambda: Net(held=1)},
    "a width": {"make": lambda: Net(hidden=9)},
    "the mode": {"make": lambda: Net().eval()},
    "the number type": {"make": lambda: Net().double(), "inputs": torch.zeros(2, 4, dtype=torch.float64)},
    "the front end": {"front_end": "export"},
    "a limit": {"trace_operations": 1000},
}


@pytest.mark.parametrize("case", sorted(CHANGES))
def test_whatever_a_trace_depends_on_is_in_its_key(case: str, traced: Traced, quick: Traced) -> None:
    chosen = traced if case == "a width" else quick
    assert chosen.misses()
    assert chosen.misses(**CHANGES[case])
    assert not chosen.misses(**CHANGES[case])


class Asking(Net):
    """Multiplies neurons by their numbers where there are many rows."""

    def forward(self, inputs: Tensor) -> Tensor:
        h = torch.relu(self.first(inputs))
        return self.last(h * torch.arange(8.0) if len(inputs) > 8 else h)


def test_what_another_case_refutes_is_kept_as_refuted(traced: Traced) -> None:
    first, second = (traced.setup(Asking).models.target_graph for _ in range(2))
    assert (traced.count, first.free_groups, second.groups) == (1, {}, first.groups)
    assert first.layouts == second.layouts
    # The program is traced when it is asked for, and tried again.
    assert second.program is not None


def test_what_has_no_value_is_not_kept(traced: Traced, traces: KeptRecords) -> None:
    class Local(Net):
        """Cannot be found by its name."""

    held = object()
    assert traced.misses(lambda: Net(held=held))
    assert traced.misses(Local)
    assert traced.misses(front_end="make-fx")  # runs on the numbers themselves
    assert not traces.sizes()


CODE = """
import torch
from torch import nn
import kept_neighbour
WIDE = True
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
    def forward(self, inputs):
        return self.last(torch.relu(self.first(inputs)))  # here
"""


def loaded(path: Path, name: str, code: str) -> ModuleType:
    """Imports code as if in a new process."""
    path.write_text(code)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    exec(compile(code, str(path), "exec"), vars(module))  # no file of compiled code, which has the age of its source
    return module


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], ModuleType]:
    for name in ("kept_nets", "kept_neighbour"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    return lambda name, code: loaded(tmp_path / f"{name}.py", name, code)


def test_one_line_of_the_users_file_makes_another_architecture(
    load: Callable[[str, str], ModuleType], quick: Traced
) -> None:
    load("kept_neighbour", "RATE = 1\n")
    assert quick.misses(load("kept_nets", CODE).Net)
    assert not quick.misses(load("kept_nets", CODE).Net)
    assert quick.misses(load("kept_nets", CODE.replace("# here", "# there")).Net)
    load("kept_neighbour", "RATE = 1\n\n")
    assert quick.misses(load("kept_nets", CODE).Net)


def test_a_constant_of_the_users_file_may_steer_its_forward(
    load: Callable[[str, str], ModuleType], quick: Traced
) -> None:
    load("kept_neighbour", "")
    module = load("kept_nets", CODE)
    assert quick.misses(module.Net)
    vars(module)["WIDE"] = False
    assert quick.misses(module.Net)


@pytest.mark.parametrize(
    ("hook", "gives"), [("mergeot_node_rules", "'kept_rules:rule'"), ("mergeot_symmetries", "Order")]
)
def test_another_version_or_file_of_a_plugin_misses(
    hook: str, gives: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: Traced
) -> None:
    package = tmp_path / "kept_rules"
    package.mkdir()
    implemented = f"@hookimpl\ndef {hook}():\n    return {{'none': {gives}}}\n"
    code = f"from mergekit_ot import Order, hookimpl\n{implemented}"
    (package / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    manager = PluginManager.load()
    sys.modules.pop("kept_rules", None)
    manager.register(importlib.import_module("kept_rules"), "kept_rules")
    assert quick.misses()
    assert quick.misses(manager=manager)
    assert not quick.misses(manager=manager)
    monkeypatch.setitem(manager._distributions, "kept_rules", ("kept-rules", "2.0"))
    assert quick.misses(manager=manager)
    (package / "more.py").write_text("")
    assert quick.misses(manager=manager)


def test_rules_that_were_made_in_this_process_are_not_kept(traced: Traced, traces: KeptRecords) -> None:
    manager = PluginManager.load()
    manager.register(SimpleNamespace(mergeot_node_rules=hookimpl(lambda: {})), "mine")
    assert traced.misses(manager=manager)
    assert traced.misses(manager=manager)
    assert not traces.sizes()


def sealed(traces: KeptRecords, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the graph of the one entry, and seals it as if mergeot had written it."""
    path = entry(traces)
    content = json.loads(path.read_text())["content"]
    change(content)
    traces.write(path.stem, content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "no text": lambda path: path.write_bytes(b"\x80\x04\x95\xff"),
    "a list": lambda path: path.write_text("[]"),
    "nested": lambda path: path.write_text("[" * 100_000),
    "a newer version": lambda path: path.write_text(path.read_text().replace('"version":1', '"version":2')),
    "another's": lambda path: path.write_text(path.read_text().replace("mergeot record", "something else")),
    "another key": lambda path: path.write_text(path.read_text().replace(path.stem, "0" * 64)),
    "another role": lambda path: path.write_text(path.read_text().replace('"IN"', '"OUT"')),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
CHANGED_GRAPHS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no groups": lambda graph: graph.pop("groups"),
    "a smaller group": lambda graph: graph["layouts"][0].__setitem__(1, [["fixed", 3], ["fixed", 4]]),
    "an unknown group": lambda graph: graph["layouts"][0].__setitem__(1, [["neurons", "who", 8], ["fixed", 4]]),
    "an unknown parameter": lambda graph: graph["layouts"][0].__setitem__(0, "third.weight"),
    "a missing role": lambda graph: graph["roles"].pop(),
    "an odd role": lambda graph: graph["roles"][0].__setitem__(3, "BOTH"),
    "an odd size": lambda graph: graph["groups"][0].__setitem__("size", "8"),
    "a negative size": lambda graph: graph["groups"][0].__setitem__("size", -8),
    "a use of nothing": lambda graph: graph["uses"].append([0, 10_000]),
    "an odd sentence": lambda graph: graph["diagnostics"].__setitem__("remarks", [7]),
}


@pytest.mark.parametrize("case", sorted(DAMAGES))
def test_a_damaged_or_foreign_entry_is_written_anew(case: str, quick: Traced, traces: KeptRecords) -> None:
    fresh = quick.setup(Net).models.target_graph
    path = entry(traces)
    whole = path.read_text()
    DAMAGES[case](path)
    found = quick.setup(Net).models.target_graph
    assert quick.count == 2
    assert found.groups == fresh.groups
    assert path.is_dir() or path.read_text() == whole


@pytest.mark.parametrize("case", sorted(CHANGED_GRAPHS))
def test_an_entry_that_is_no_graph_of_the_module_is_written_anew(case: str, quick: Traced, traces: KeptRecords) -> None:
    quick.setup(Net)
    whole = entry(traces).read_text()
    sealed(traces, CHANGED_GRAPHS[case])
    assert entry(traces).read_text() != whole
    assert quick.misses()
    assert entry(traces).read_text() == whole


def test_a_program_that_is_not_that_of_the_entry_is_told(quick: Traced, traces: KeptRecords) -> None:
    quick.setup(Net)
    sealed(traces, lambda graph: graph["groups"][0].__setitem__("first_operation", 77))
    graph = quick.setup(Net).models.target_graph
    with pytest.raises(ArchitectureError, match=r"mergeot cache --clear"):
        _ = graph.program


def test_whatever_is_written_reads_as_a_graph_or_as_none() -> None:
    graph, draw = graph_of_net(), random.Random(0)
    whole, shapes = graph_as_plain(graph), {name: value.shape for name, value in Net().named_parameters()}
    refused = 0
    for _ in range(300):
        data = json.loads(json.dumps(whole))
        place: Any = data
        while True:
            key = draw.choice(list(place) if isinstance(place, dict) else list(range(len(place))))
            if not (isinstance(place[key], dict | list) and place[key]) or draw.random() < 0.1:
                break
            place = place[key]
        place[key] = draw.choice([None, -1, 0, 3, 1 << 70, "", "first.weight:0", "OUT", [], [[]], {}, 0.5, True])
        try:
            read = graph_from_plain(data, shapes)
        except StoredGraphError:
            refused += 1
        else:
            assert read.outline().groups.keys() >= {slot for _, _, slot in read.roles}
    assert refused > 100


def test_a_graph_survives_its_text() -> None:
    graph = trace_model(nn.LSTM(3, 4, num_layers=2), torch.zeros(2, 5, 3))
    shapes = {name: value.shape for name, value in nn.LSTM(3, 4, num_layers=2).named_parameters()}
    read = graph_from_plain(json.loads(json.dumps(graph_as_plain(graph))), shapes)
    assert all(vars(read)[part] == vars(graph)[part] for part in PARTS)
    assert read.program is None


@pytest.mark.slow
def test_a_second_run_of_the_command_imports_no_compiler(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "from torch import nn\ndef mlp():\n    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))\n"
    )
    for name in ("a", "b"):
        torch.save(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).state_dict(), tmp_path / f"{name}.pt")
    heavy = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.onnx", "sympy", "networkx", "scipy")
    code = f"""
import sys
from mergekit_ot.cli.app import main
try:
    main(["fuse", "a.pt", "b.pt", "--arch", "nets.py:mlp", "-o", "fused.pt"])
finally:
    print(sorted(name for name in {heavy} if name in sys.modules))
"""
    said = []
    for _ in range(2):
        settings = {**os.environ, "MERGEOT_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=settings, capture_output=True, text=True, check=True
        )
        said.append(done.stdout.splitlines()[-1])
    assert "torch._dynamo" in said[0]
    assert said[1] == "[]"
