"""``mergeot demo``: what it measures, what it writes, and that the commands it suggests work."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mergeot_demo.run
import pytest
import torch

from mergekit_ot.api import load_checkpoint
from mergekit_ot.cli.app import main
from mergekit_ot.hooks.manager import default_manager


def _run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    out, err = capsys.readouterr()
    assert (stopped.value.code or 0) == 0, err
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "with a space"


@pytest.fixture(scope="module")
def content(folder: Path) -> dict[str, Any]:
    """What the demo prints with ``--json``."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as stopped:
        main(["demo", "--output", str(folder), "--seed", "0", "--json"])
    assert not stopped.value.code
    return json.loads(printed.getvalue())


def test_demo_shows_the_main_job(content: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = {row["name"]: row["accuracy"] for row in content["rows"]}
    assert min(accuracy["source A"], accuracy["source B"]) > 94
    assert accuracy["naive average"] < 80
    solvers = set(default_manager().solvers)
    assert {f"fused, {name}" for name in solvers} <= set(accuracy)
    assert accuracy[f"fused, {content['best']}"] > 92
    assert accuracy["ensemble of the two"] > 94
    sources = (accuracy["source A"] + accuracy["source B"]) / 2
    assert accuracy[f"fused, {content['best']}, refit"] > sources - 1
    assert content["aligned_barrier"] < 6 < content["naive_barrier"]
    assert all(Path(path).stat().st_size > 1000 for path in content["files"])
    assert load_checkpoint(folder / "fused.pt").architecture == "mlp"
    for command in content["commands"]:
        assert command[0] == "mergeot"
        _run(command[1:], capsys)
    assert (folder / "mine.pt").exists()
    assert (folder / "again.png").exists()


def test_test_digits_choose_nothing(
    content: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every test digit has a wrong label, the same fusion is the best and is written."""
    resolve, train = mergeot_demo.run.resolve_data, mergeot_demo.run.train
    trained_on: list[torch.Tensor] = []

    def mislabelled(name: str, manager: Any, split: str) -> Callable[[], Any]:
        batches = list(resolve(name, manager, split)())
        return lambda: [(x, (y + 1) % 10) for x, y in batches] if split == "test" else batches

    def recorded(make: Any, inputs: torch.Tensor, targets: torch.Tensor, seed: int) -> torch.nn.Module:
        trained_on.append(inputs)
        return train(make, inputs, targets, seed)

    monkeypatch.setattr(mergeot_demo.run, "resolve_data", mislabelled)
    monkeypatch.setattr(mergeot_demo.run, "train", recorded)
    result = mergeot_demo.run.run_demo(tmp_path, 0, lambda text: None)
    accuracy = {row.name: row.accuracy for row in result.rows}
    assert result.best == content["best"]
    assert accuracy[f"fused, {result.best}"] < 10
    ours, theirs = (dict(load_checkpoint(path / "fused.pt").state) for path in (folder, tmp_path))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # What chooses was held back: no network was trained on all training digits.
    every = torch.cat([images for images, _ in resolve("digits", split="train")()])
    assert all(len(inputs) < len(every) for inputs in trained_on)


def test_demo_into_a_file_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--output", str(tmp_path / "taken" / "demo")])
    assert stopped.value.code == 1
    assert "Cannot create" in capsys.readouterr().err
