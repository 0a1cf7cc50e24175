"""A third symmetry comes in through the door: found, proven, drawn and checked without a line of the core about it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import mergeot_layers
import mergeot_scales
import pytest
import torch
from mergeot_scales.symmetry import Scale
from torch import nn

from mergekit_ot import ModelGraph, NodeRule, Order, Sign, check_model, hookimpl, save_checkpoint, trace_model
from mergekit_ot.errors import PluginError
from mergekit_ot.graph.symmetry.planted import PlantedProof, find_proven
from mergekit_ot.graph.symmetry.transformation import Transformation
from mergekit_ot.hooks.manager import PluginManager
from mergekit_ot.testing import check_symmetry

FOLDER = Path(__file__).parent / "scales"
MANAGER = PluginManager([mergeot_layers, mergeot_scales])


def layers(activation: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, 3))


def convolutions(norm: Callable[[int], nn.Module] = nn.Identity) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3),
        norm(5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 4, 2),
        norm(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 2),
    )


class Residual(nn.Module):
    """A stream with a layer norm in every branch: only the neurons inside the branch may be scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.up, self.down, self.head = nn.Linear(6, 7), nn.Linear(7, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        return self.head(self.norm(x + self.down(torch.relu(self.up(self.norm(x))))))


class Grouped(nn.Module):
    """Grouped convolutions: a family of neurons, and the groups by which it is indexed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(2, 6, 1), nn.Conv1d(6, 9, 1, groups=3)
        self.last = nn.Conv1d(9, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


ROWS, PICTURES = torch.randn(5, 4), torch.randn(2, 2, 8, 8)

CASES: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, set[str]]] = {
    "relu": (lambda: layers(nn.ReLU), ROWS, {"0.weight:0", "2.weight:0"}),
    "leaky relu": (lambda: layers(nn.LeakyReLU), ROWS, {"0.weight:0", "2.weight:0"}),
    "tanh": (lambda: layers(nn.Tanh), ROWS, set()),
    "gelu": (lambda: layers(nn.GELU), ROWS, set()),
    "convolutions": (convolutions, PICTURES, {"0.weight:0", "4.weight:0"}),
    "convolutions with batch norm": (lambda: convolutions(nn.BatchNorm2d), PICTURES, set()),
    "stream with layer norm": (Residual, ROWS, {"up.weight:0"}),
}


def scales_of(make: Callable[[], nn.Module], inputs: torch.Tensor) -> tuple[ModelGraph, dict]:
    graph = trace_model(make(), inputs)
    return graph, find_proven(Scale(), graph, PlantedProof(make, (inputs,)))


@pytest.mark.parametrize("name", CASES)
def test_scales_are_found_where_they_hold_and_nowhere_else(name: str) -> None:
    make, inputs, expected = CASES[name]
    report = check_model(make, inputs, manager=MANAGER)
    assert set(report.symmetries["scale"]) == expected
    assert set(report.symmetries["order"]) == set(report.graph.free_groups)
    assert report.preserved
    assert report.culprits == ()


@pytest.mark.parametrize("symmetry", [Order(), Sign(), Scale()], ids=lambda symmetry: symmetry.name)
@pytest.mark.parametrize("name", ["relu", "tanh", "convolutions", "grouped"])
def test_a_random_element_keeps_the_function_and_on_readers_alone_it_does_not(name: str, symmetry) -> None:
    make, inputs = (Grouped, torch.randn(2, 2, 5)) if name == "grouped" else CASES[name][:2]
    graph = trace_model(make(), inputs)
    places = find_proven(symmetry, graph, PlantedProof(make, (inputs,)))
    assert bool(places) == ((symmetry.name, name) not in UNSUITED)
    torch.manual_seed(1)
    model, others = make().double().eval(), torch.randn(7, *inputs.shape[1:], dtype=torch.float64)
    before = model(others)
    planted = Transformation.random(symmetry, graph, places, torch.Generator().manual_seed(0))

    def outputs(transformation: Transformation) -> torch.Tensor:
        copy = make().double().eval()
        copy.load_state_dict(transformation.of_state(model.state_dict()))
        return copy(others)

    torch.testing.assert_close(outputs(planted), before, rtol=0, atol=1e-10)
    for key, where in places.items():
        slots = graph.groups[key].places
        readers = {place: powers for place, powers in where.items() if slots[place].is_reader}
        alone = Transformation(symmetry, graph, {key: readers}, {key: planted.elements[key]})
        assert (outputs(alone) - before).abs().max() > 20 * 1e-10


UNSUITED = {("sign", "relu"), ("sign", "convolutions"), ("sign", "grouped"), ("scale", "tanh")}


def test_every_member_of_a_family_has_a_scale_of_its_own() -> None:
    graph, scales = scales_of(Grouped, torch.randn(2, 2, 5))
    (family,) = [key for key in scales if graph.groups[key].context and "second.weight:0" in key]
    element = Transformation.random(Scale(), graph, {family: scales[family]}, torch.Generator().manual_seed(0))
    assert element.elements[family].shape == (3, 3)
    bias = element.of_state({"second.bias": torch.ones(9)})["second.bias"]
    assert torch.allclose(bias, element.elements[family].flatten().float())


class OnMakersAlone(Scale):
    """Forgets that what reads a neuron has to undo its scale, and asks nobody."""

    def find(self, graph, proof):
        return {
            key: {place: (0 if slot.is_reader else 1,) for place, slot in group.places.items()}
            for key, group in graph.free_groups.items()
        }


def test_without_any_symmetry_there_is_no_proof() -> None:
    class RulesAlone:
        @hookimpl
        def mergeot_node_rules(self) -> Mapping[str, NodeRule | str]:
            return mergeot_layers.mergeot_node_rules()

    with pytest.raises(PluginError, match="no neuron group can be proven"):
        check_model(*CASES["relu"][:2], manager=PluginManager([RulesAlone()]))


def test_a_wrong_symmetry_is_refused_by_the_proof() -> None:
    class Wrong:
        @hookimpl
        def mergeot_symmetries(self) -> dict[str, type[Scale]]:
            return {"scale": OnMakersAlone}

    make, inputs, _ = CASES["relu"]
    graph = trace_model(make(), inputs)
    proof = PlantedProof(make, (inputs,))
    assert set(OnMakersAlone().find(graph, proof)) == {"0.weight:0", "2.weight:0"}
    assert find_proven(OnMakersAlone(), graph, proof) == {}
    report = check_model(make, inputs, manager=PluginManager([mergeot_layers, Wrong()]))
    counts = {name: len(found) for name, found in report.symmetries.items()}
    assert counts == {**dict.fromkeys(counts, 0), "order": 2, "positive scale": 2}
    assert {"scale", "sign"} <= counts.keys()
    assert (report.preserved, report.culprits) == (True, ())


def test_the_command_line_lists_it(tmp_path: Path) -> None:
    """With its entry point in place, and nothing else."""
    installed = tmp_path / "mergeot_scales-0.0.1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: mergeot-scales\nVersion: 0.0.1\n")
    (installed / "entry_points.txt").write_text("[mergekit_ot]\nscales = mergeot_scales\n")
    (tmp_path / "relu.py").write_text(
        "from torch import nn\ndef relu():\n    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))\n"
    )
    path = save_checkpoint(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), tmp_path / "net.pt")
    places = [str(tmp_path), str(FOLDER), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(place for place in places if place)}

    def run(*arguments: str) -> dict:
        code = f"import sys; sys.argv = ['mergeot', *{arguments!r}]; from mergekit_ot.cli.app import main; main()"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    checked = run("check", str(path), "--arch", f"{tmp_path / 'relu.py'}:relu", "--input-shape", "4", "--json")
    counts = checked["symmetries"]
    assert counts == {**dict.fromkeys(counts, 0), "order": 1, "positive scale": 1, "scale": 1}
    assert run("plugins", "--json")["symmetries"] == sorted(counts)


def test_it_keeps_the_contract_that_ours_keep() -> None:
    for make, inputs, expected in CASES.values():
        assert set(check_symmetry(Scale(), make, inputs, groups=len(expected))) == expected


def test_scales_that_readers_do_not_undo_break_the_contract() -> None:
    with pytest.raises(PluginError, match="the function changed with elements at"):
        check_symmetry(OnMakersAlone(), *CASES["relu"][:2])


def test_the_page_shows_what_stands_here() -> None:
    page = (FOLDER.parents[2] / "docs" / "how-to" / "symmetries.md").read_text(encoding="utf-8")
    shown, contract = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    written = (FOLDER / "mergeot_scales" / "symmetry.py").read_text(encoding="utf-8")
    imported, defined = shown.split("\n\n\n", 1)
    assert defined in written
    assert imported in written
    names = {"Scale": Scale, "torch": torch}
    exec(contract, names)
    names["test_scale_keeps_the_contract"]()
