"""The example of a solver, installed as a third party would, and the tutorial that builds it from an empty folder."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mergekit_ot
from mergekit_ot import (
    BarycenterProblem,
    NeuronMeasure,
    RecipeError,
    Scope,
    SolverError,
    Start,
    Status,
    couple,
    evaluate,
    fuse,
    ground_cost,
    load_checkpoint,
    resolve_architecture,
    resolve_data,
)
from mergekit_ot.testing import check_solver, random_problem

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "plugins" / "example_greedy_matching"
MODULE = "example_greedy_matching"
FILES = ("pyproject.toml", f"{MODULE}.py")
CONTRACT = "test_greedy.py"
PAGE = ROOT / "docs" / "tutorials" / "write-a-solver.md"
LINES = 80

END = "== end of a command =="
# Several commands in one process: starting it takes longer than most of them.
MERGEOT = f"""
import json, sys
from mergekit_ot.cli.app import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as stop:
        if stop.code:
            raise
    for stream in (sys.stdout, sys.stderr):
        print({END!r}, file=stream, flush=True)
"""
PIP = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation"]
# What decides which plugins are loaded and how pytest runs must not leak from this run into the tutorial's.
LEAKS = ("MERGEOT_PLUGINS", "MERGEOT_LOG", "PYTEST_ADDOPTS")
# Trained numbers and seconds differ from machine to machine; whole numbers (sizes, counts) do not.
MEASURED = re.compile(r"\d+(\.\d+)?e[-+]\d+|\d+\.\d+")
OMITTED = "…"
# Asked after the page's own commands.
QUESTIONS = (
    "mergeot plugins --json",
    "mergeot fuse mergeot-demo/source-a.pt mergeot-demo/source-b.pt -o again.pt --solver greedy --json",
)


@dataclass(frozen=True)
class Step:
    """One thing that the page tells its reader to do.

    Attributes:
        words: A command, or ``write`` and the name of a file.
        text: What the page shows below the command, or what stands in the file.
    """

    words: list[str]
    text: str


def _blocks() -> Iterator[tuple[str, str, str]]:
    """Yields the fenced blocks: the file that the line before names (or nothing), the language and the text."""
    block = r"(?:^`([^`\n]+)`:\n\n)?^```(\w*)\n(.*?)^```$"
    for found in re.finditer(block, PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        yield found[1] or "", found[2], found[3]


def _steps() -> Iterator[Step]:
    for file, language, text in _blocks():
        if file:
            yield Step(["write", file], text)
        elif language == "console":
            for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                command, _, shown = part.partition("\n")
                yield Step(shlex.split(command), shown)


def _file(name: str) -> str:
    (found,) = [text for file, _, text in _blocks() if file == name]
    return found


@dataclass
class Reader:
    """Somebody who follows the page from an empty folder: writes its files and types its commands.

    Attributes:
        folder: Where the reader is.
        installed: Where pip puts the distribution, so that the environment of this run stays as it is.
    """

    folder: Path
    installed: Path

    def follow(self, steps: Iterable[Step]) -> list[str]:
        """Does every step, and returns what each prints; consecutive ``mergeot`` commands share one process."""
        printed: list[str] = []
        for program, group in itertools.groupby(steps, key=lambda step: step.words[0]):
            several = list(group)
            if program == "mergeot":
                printed.extend(self.mergeot(*(step.words[1:] for step in several)))
            else:
                printed.extend(self.other(step) for step in several)
        return printed

    def other(self, step: Step) -> str:
        program, *arguments = step.words
        if program == "mkdir":
            (self.folder / arguments[0]).mkdir()
        elif program == "cd":
            self.folder = self.folder / arguments[0]
        elif program == "write":
            (self.folder / arguments[0]).write_text(step.text, encoding="utf-8")
        elif program == "pip":
            self.run("-m", "pip", *arguments, *PIP, "--target", str(self.installed))
        elif program == "python":
            return self.run(*arguments).stdout
        else:
            pytest.fail(f"The page uses '{program}', which this test cannot type.")
        return ""

    def mergeot(self, *several: list[str]) -> Iterator[str]:
        """Yields what each command prints: standard error, then standard output."""
        # -P: the module in this folder must not stand in for the installed one.
        done = self.run("-P", "-c", MERGEOT, json.dumps(several))
        streams = (stream.split(f"{END}\n")[:-1] for stream in (done.stderr, done.stdout))
        yield from map("".join, zip(*streams, strict=True))

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name not in LEAKS}
        paths = [str(self.installed), *filter(None, [environment.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
        )
        assert done.returncode == 0, f"{arguments}: {done.stderr}{done.stdout}"
        return done


@dataclass(frozen=True)
class Followed:
    """What has become of the page in the reader's hands: where, what was printed, and the answers to two questions."""

    reader: Reader
    printed: list[str]
    listed: dict[str, Any]
    fused: dict[str, Any]


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Followed:
    reader = Reader(tmp_path_factory.mktemp("reader"), tmp_path_factory.mktemp("installed"))
    *printed, listed, fused = reader.follow([*_steps(), *(Step(shlex.split(words), "") for words in QUESTIONS)])
    # The last line is standard output's; what stands before it comes from standard error.
    return Followed(reader, printed, *(json.loads(answer.splitlines()[-1]) for answer in (listed, fused)))


def _comparable(text: str) -> list[str]:
    """Returns lines without their spacing and measured numbers; empty and omitted ones are left out."""
    plain = (" ".join(MEASURED.sub("#", line).split()) for line in text.splitlines())
    return [line for line in plain if line not in ("", OMITTED)]


def test_files_on_the_page_are_the_examples_own():
    for name in FILES:
        assert _file(name).encode() == (EXAMPLE / name).read_bytes()
    assert {file for file, _, _ in _blocks() if file} == {*FILES, CONTRACT}


def test_distribution_is_short_and_whole():
    tracked = [path.name for path in EXAMPLE.iterdir() if path.suffix in (".py", ".toml")]
    assert sorted(tracked) == sorted(FILES)
    lines = {name: len(_file(name).splitlines()) for name in FILES}
    assert sum(lines.values()) < LINES
    # The page says how many the module has.
    assert f"one module of {lines[f'{MODULE}.py']} lines" in PAGE.read_text(encoding="utf-8")


def test_it_takes_public_names_only():
    taken = {
        node.attr
        for node in ast.walk(ast.parse((EXAMPLE / f"{MODULE}.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mergeot"
    }
    assert len(taken) >= 10
    assert taken <= set(mergekit_ot.__all__)


def test_who_follows_the_page_sees_what_it_shows(followed):
    for step, printed in zip(_steps(), followed.printed, strict=True):
        if step.words[0] == "write":
            continue
        lines, command = _comparable(printed), " ".join(step.words)
        places = []
        for line in _comparable(step.text):
            assert line in lines, f"'{command}' does not print '{line}', but {lines}"
            places.append(lines.index(line))
        assert places == sorted(places), f"'{command}' prints the lines of the page in another order"


def test_who_follows_the_page_has_the_example(followed):
    written = {*FILES, CONTRACT, "greedy.pt", "half.pt", "wb.pt"}
    assert written <= {path.name for path in followed.reader.folder.iterdir()}
    assert (followed.reader.installed / f"{MODULE}.py").read_bytes() == (EXAMPLE / f"{MODULE}.py").read_bytes()


def test_it_is_listed_with_its_distribution(followed):
    (row,) = [row for row in followed.listed["plugins"] if row["name"] == MODULE]
    assert (row["distribution"], row["version"], row["hooks"]) == (
        "example-greedy-matching",
        "0.0.1",
        ["mergeot_solvers"],
    )
    assert {"greedy", "wb"} <= set(followed.listed["solvers"])


def test_it_fuses_what_the_demo_trained(followed):
    fused = followed.fused
    assert (fused["output"], fused["solver"]) == ("again.pt", "greedy")
    assert [(group["name"], group["size"], group["status"]) for group in fused["groups"]] == [
        (f"fc{number}.weight:0", 64, "converged") for number in (1, 2, 3)
    ]
    assert all(group["cost"] > 0 for group in fused["groups"])
    assert fused["aligned_sources_max_error"] < 1e-4
    network = resolve_architecture("mlp?sizes=64-64-64-64-10")()
    network.load_state_dict(load_checkpoint(followed.reader.folder / "again.pt").state)
    (score,) = evaluate([network], resolve_data("digits"))
    # The sources have 96 and 97 %, and their mean without alignment below 30 %.
    assert score.accuracy > 88


@pytest.fixture
def example(monkeypatch) -> Any:
    return _loaded((EXAMPLE / f"{MODULE}.py").read_text(encoding="utf-8"), monkeypatch)


def _loaded(code: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(MODULE, None))
    monkeypatch.setitem(sys.modules, MODULE, module)
    exec(code, module.__dict__)
    return module


def test_contract_names_the_clause_as_the_page_says(monkeypatch):
    (shown,) = [text.strip() for _, _, text in _blocks() if "breaks its contract" in text]
    code, count = re.subn(
        r"mergeot\.Permutation\(index\)", "mergeot.Permutation(index.argsort())", _file(f"{MODULE}.py")
    )
    assert count == 1
    with pytest.raises(SolverError) as raised:
        check_solver(_loaded(code, monkeypatch).GreedySolver())
    assert MEASURED.sub("#", str(raised.value)) == MEASURED.sub("#", shown)


@pytest.mark.parametrize("share", [1.0, 0.7, 0.0])
def test_planted_order_is_recovered(example, share):
    source = _network(0)
    copies = [source, _reordered(source, 3), _reordered(source, 5)]
    inputs = torch.randn(20, 5, dtype=torch.float64)
    result = fuse(copies, solver=example.GreedySolver(share=share), example_inputs=inputs, device="cpu")
    torch.testing.assert_close(result.model()(inputs), source(inputs), rtol=0, atol=1e-12)


def _network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)).double()


def _reordered(model: nn.Module, shift: int) -> nn.Module:
    """Returns the same function with its hidden neurons in another order."""
    moved = _network(0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for own, reader, size in (("0", "2", 8), ("2", "4", 7)):
        order = torch.arange(size).roll(shift)
        state[f"{own}.weight"] = state[f"{own}.weight"][order]
        state[f"{own}.bias"] = state[f"{own}.bias"][order]
        state[f"{reader}.weight"] = state[f"{reader}.weight"][:, order]
    moved.load_state_dict(state)
    return moved


@pytest.mark.parametrize("seed", range(5))
def test_rounds_give_what_one_pair_at_a_time_gives(example, seed):
    problem = random_problem((30, 30), dimension=3, seed=seed)
    cost = ground_cost(*(measure.support for measure in problem.measures))
    expected = torch.empty(30, dtype=torch.long)
    for _ in range(30):
        row, column = divmod(int(cost.argmin()), 30)
        expected[row] = column
        cost[row], cost[:, column] = torch.inf, torch.inf
    found = example.GreedySolver().solve(problem)
    assert found.couplings[0].is_identity
    assert torch.equal(found.couplings[1].index, expected)


def test_equal_costs_still_give_pairs_that_nobody_would_leave(example):
    generator = torch.Generator().manual_seed(0)
    measures = tuple(NeuronMeasure.uniform(torch.randint(3, (12, 2), generator=generator).double()) for _ in "ab")
    index = example.GreedySolver().solve(BarycenterProblem(measures, (0.5, 0.5), 12)).couplings[1].index
    assert torch.equal(index.sort().values, torch.arange(12))
    cost = ground_cost(measures[0].support, measures[1].support)
    own = cost[torch.arange(12), index]
    assert not bool(((cost < own[:, None]) & (cost < own[index.argsort()])).any())


def test_less_greed_never_costs_more(example):
    problem = random_problem((40, 40), dimension=4, model_weights=(0.3, 0.7))
    costs = [example.GreedySolver(share=share).solve(problem).cost for share in (1.0, 0.75, 0.5, 0.25, 0.0)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]
    cost = ground_cost(problem.measures[1].support, problem.measures[0].support)
    least = 0.3 * 0.7 * float(cost[torch.arange(40), couple(cost).index].mean())
    assert costs[-1] == pytest.approx(least, rel=1e-9)


def test_sources_of_other_sizes_and_masses_get_transport_plans(example):
    problem = random_problem((6, 9, 6), size=6)
    mass = torch.tensor([0.3, 0.1, 0.2, 0.1, 0.2, 0.1], dtype=torch.float64)
    uneven = replace(problem.measures[2], mass=mass)
    found = example.GreedySolver().solve(replace(problem, measures=(*problem.measures[:2], uneven)))
    assert [coupling.is_permutation for coupling in found.couplings] == [True, False, False]
    for coupling, measure in zip(found.couplings[1:], (problem.measures[1], uneven), strict=True):
        torch.testing.assert_close(coupling.source_marginal(), measure.mass)
        torch.testing.assert_close(coupling.target_marginal(), torch.full((6,), 1 / 6, dtype=torch.float64))
    with pytest.raises(SolverError, match="needs a source of 7 neurons"):
        example.GreedySolver().solve(random_problem((6, 9), size=7))


def test_source_of_weight_zero_has_no_say(example):
    problem = random_problem((8, 8, 8), model_weights=(0.0, 0.5, 0.5))
    found = example.GreedySolver().solve(problem)
    alone = example.GreedySolver().solve(replace(problem, measures=problem.measures[1:], model_weights=(0.5, 0.5)))
    assert found.cost == alone.cost
    assert torch.equal(found.measure.support, alone.measure.support)


def test_what_is_not_finite_is_not_matched(example):
    problem = random_problem((5, 5))
    problem.measures[1].support[2, 1] = torch.nan
    assert example.GreedySolver().solve(problem).status is Status.NONFINITE
    problem.measures[1].support[2, 1] = 1e300
    with pytest.raises(SolverError, match="not finite"):
        example.GreedySolver().solve(problem)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_share_is_checked(example, share):
    with pytest.raises(RecipeError, match=r"Option share=.* of 'greedy'"):
        example.GreedySolver(share=share)


def test_four_attributes_make_weight_matching_of_it(example):
    attributes = {"scope": Scope.INCIDENT, "start": Start.IDENTITY, "max_sweeps": 100, "is_order_random": True}
    kind = type("Swept", (example.GreedySolver,), attributes)
    check_solver(kind())
    models = [_network(1), _network(2)]
    inputs = torch.randn(2, 5, dtype=torch.float64)
    exact = fuse(models, solver=kind(share=0.0), example_inputs=inputs, device="cpu").state
    expected = fuse(models, solver="weight-matching", example_inputs=inputs, device="cpu").state
    for name, value in expected.items():
        torch.testing.assert_close(exact[name], value, rtol=0, atol=1e-12)
