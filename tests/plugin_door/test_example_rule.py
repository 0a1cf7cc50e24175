"""The example of a rule for a module, installed as a third party would, and the page that explains it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mergekit_ot import resolve_architecture
from mergekit_ot.testing import check_rule

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "plugins" / "example_radial_basis"
MODULE = "example_radial_basis.py"
PAGE = ROOT / "docs" / "how-to" / "unknown-operations.md"
BUILT = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")

MERGEOT = "from mergekit_ot.cli.app import main; main()"
WITHOUT = "mergeot_layers"
WITH = "mergeot_layers,example_radial_basis"
BY_PATH = ("check", "net.pt", "--arch", f"{MODULE}:radial")
BY_NAME = ("check", "net.pt", "--arch", "radial")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Installs the example with pip, and saves a checkpoint beside it."""
    folder = tmp_path_factory.mktemp("example")
    source = shutil.copytree(EXAMPLE, folder / "source", ignore=BUILT)
    place = folder / "installed"
    options = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(place), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.save(resolve_architecture(f"{place / MODULE}:radial")().state_dict(), place / "net.pt")
    return place


def _run(place: Path, plugins: str, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(place), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "MERGEOT_PLUGINS": plugins}
    command = [sys.executable, "-P", "-c", code, *arguments]
    done = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def _blocks(language: str) -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def _block(language: str, word: str) -> str:
    (found,) = [block for block in _blocks(language) if word in block]
    return found


def test_it_is_listed_with_its_distribution(installed):
    (row,) = json.loads(_run(installed, "example_radial_basis", MERGEOT, "plugins", "--json").stdout)["plugins"]
    assert (row["name"], row["distribution"], row["version"]) == (
        "example_radial_basis",
        "example-radial-basis",
        "0.0.1",
    )
    assert sorted(row["hooks"]) == ["mergeot_architectures", "mergeot_node_rules"]


def test_without_the_rule_the_layer_is_pinned_and_named(installed):
    done = _run(installed, WITHOUT, MERGEOT, *BY_PATH, "--json")
    found = json.loads(done.stdout)
    # All axes of two weights, two biases, the centres and their widths.
    assert (found["groups"], found["certified"], found["pinned"], found["preserved"]) == (0, 0, 9, None)
    (warning,) = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert "No rule for operation radial_basis.distances.default at 'basis'" in warning
    assert re.search(rf"\({re.escape(MODULE)}:\d+\)", warning)
    assert f"see 'mergeot docs {PAGE.stem}'" in warning


def test_with_the_rule_every_group_is_certified(installed):
    done = _run(installed, WITH, MERGEOT, *BY_NAME, "--json")
    found = json.loads(done.stdout)
    # The neurons of the first layer and those of the basis; pinned are the columns of the first weight, and the rows of
    # the last weight and bias.
    counts = {name: found[name] for name in ("groups", "families", "certified", "pinned")}
    assert counts == {"groups": 2, "families": 2, "certified": 2, "pinned": 3}
    assert found["preserved"] is True
    assert "warning" not in done.stderr


def test_code_on_the_page_is_the_plugins_own():
    module = (EXAMPLE / MODULE).read_text(encoding="utf-8")
    block = _block("python", "class RadialBasis")
    start = module.index("class RadialBasis")
    assert module[start : start + len(block)] == block
    assert '"module:RadialBasis": RADIAL_BASIS' in block
    assert _block("toml", "entry-points") in (EXAMPLE / "pyproject.toml").read_text(encoding="utf-8")


def test_contract_holds_as_the_page_proves_it(installed):
    _run(installed, WITH, f"{_block('python', 'check_rule')}\n\ntest_radial_basis()")


@pytest.mark.parametrize(("plugins", "arguments"), [(WITHOUT, BY_PATH), (WITH, BY_NAME)], ids=["without", "with"])
def test_output_on_the_page_is_what_is_printed(installed, plugins, arguments):
    prompt = f"$ mergeot {' '.join(arguments)}"
    shown = _block("console", prompt).splitlines()
    assert shown[0] == prompt
    printed = [" ".join(line.split()) for line in _run(installed, plugins, MERGEOT, *arguments).stderr.splitlines()]
    places = [printed.index(" ".join(line.split())) for line in shown[1:]]
    assert len(places) > 3
    assert places == sorted(places)


@torch.library.custom_op("radial_basis_tests::distances", mutates_args=())
def distances(values: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Distances of values from centres."""
    return torch.cdist(values, centres)


@distances.register_fake
def _(values: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    return values.new_empty(*values.shape[:-1], len(centres))


@torch.library.custom_op("radial_basis_tests::peaks", mutates_args=())
def peaks(values: torch.Tensor, dim: int) -> torch.Tensor:
    """The largest value so far."""
    return torch.cummax(values, dim).values


@peaks.register_fake
def _(values: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.empty_like(values)


class Distances(nn.Module):
    """Distances to learned points, as an operation in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.points = nn.Parameter(torch.randn(5, 6))
        self.last = nn.Linear(5, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(distances(self.first(inputs), self.points))


class Peaks(nn.Module):
    """Features that keep their largest value so far."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        over_time = peaks(self.first(inputs), 1)
        return self.last(peaks(self.second(over_time), 2))


def test_rules_for_operations_on_the_page_keep_the_contract():
    written: dict = {}
    for word in ("DISTANCES", "PEAKS"):
        exec(_block("python", word), written)
    for shape in ((3, 4), (3, 7, 4)):
        check_rule(
            written["DISTANCES"], Distances, torch.randn(shape), operation="radial_basis_tests.distances", groups=2
        )
    # Those of the second layer have a running maximum along themselves.
    report = check_rule(written["PEAKS"], Peaks, torch.randn(3, 7, 4), operation="radial_basis_tests.peaks", groups=1)
    assert any("running maximum" in why for why in report.pins)
