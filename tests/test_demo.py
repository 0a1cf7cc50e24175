"""``mergeot demo``: what it measures, what it writes, and that the commands it suggests work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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


def test_demo_shows_the_main_job(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(_run(["demo", "--output", str(folder), "--seed", "0", "--json"], capsys))
    accuracy = {row["name"]: row["accuracy"] for row in content["rows"]}
    assert min(accuracy["source A"], accuracy["source B"]) > 94
    assert accuracy["naive average"] < 80
    solvers = set(default_manager().solvers)
    assert {f"fused, {name}" for name in solvers} <= set(accuracy)
    assert accuracy[f"fused, {content['best']}"] > 92
    assert accuracy[f"fused, {content['best']}"] == max(accuracy[f"fused, {name}"] or 0 for name in solvers)
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


def test_demo_into_a_file_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--output", str(tmp_path / "taken" / "demo")])
    assert stopped.value.code == 1
    assert "Cannot create" in capsys.readouterr().err
