"""The command line of barriers: aligned, repaired, and on a plane."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from test_cli import Run, run  # noqa: F401
from torch import nn

from mergekit_ot import resolve_architecture

_CURVE = {"t", "loss", "accuracy", "loss_barrier", "error_barrier"}
_NORMED = """
from torch import nn

def normed(hidden=24):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, hidden),
        nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 10),
    )
"""


def _plant(run: Run) -> None:  # noqa: F811
    """Writes c.pt: B with a little noise, so that aligning does not end at A itself."""
    torch.manual_seed(5)
    torch.save({name: value + 0.02 * torch.randn_like(value) for name, value in run.b.items()}, "c.pt")


def _flat(curve: dict) -> dict:
    return {name: curve[name] for name in _CURVE}


def test_everything_at_once(run: Run) -> None:  # noqa: F811
    _plant(run)
    content = run.json(
        "barrier",
        "a.pt",
        "c.pt",
        *run.arch,
        "--data",
        "data.npz",
        "--align",
        "weight-matching",
        "--points",
        "5",
        "--repair",
        "reset",
        "--refine",
        "--restarts",
        "2",
        "--measure",
        "weights",
        "--plot",
        "curve.svg",
        "--plane",
        "plane.png",
        "--plane-points",
        "4",
    )
    assert set(content) == _CURVE | {"aligned", "repaired", "plane"}
    assert set(content["aligned"]) == _CURVE
    assert set(content["repaired"]) == _CURVE | {"aligned"}
    # Without BatchNorm there is nothing to re-estimate.
    assert _flat(content["repaired"]) == _flat(content)
    assert content["repaired"]["aligned"] == content["aligned"]
    assert content["aligned"]["loss_barrier"] < 1e-2 * content["loss_barrier"]
    found = content["plane"]
    assert set(found) == {"x", "y", "loss", "accuracy", "models", "clamped"}
    assert (len(found["x"]), len(found["y"])) == (4, 4)
    assert [len(row) for row in found["loss"]] == [len(row) for row in found["accuracy"]] == [4] * 4
    assert list(found["models"]) == ["A", "B", "aligned B", "fused"]
    for name, (curve, place) in {
        "A": (content, 0),
        "B": (content, 4),
        "aligned B": (content["aligned"], 4),
        "fused": (content["aligned"], 2),
    }.items():
        assert found["models"][name]["loss"] == pytest.approx(curve["loss"][place], rel=1e-4)
    assert all(Path(name).stat().st_size > 5000 for name in ("curve.svg", "plane.png"))


def test_nothing_is_added_that_was_not_asked_for(run: Run) -> None:  # noqa: F811
    given = ("barrier", "a.pt", "b.pt", *run.arch, "--data", "data.npz")
    plain = run.json(*given)
    assert set(plain) == _CURVE | {"aligned"}
    assert plain["aligned"] is None
    assert len(plain["t"]) == 25
    repaired = run.json(*given, "--repair", "reset", "--points", "3")
    assert set(repaired) == _CURVE | {"aligned", "repaired"}
    assert repaired["aligned"] is repaired["repaired"]["aligned"] is None
    assert run.json(*given, "--repair", "none", "--points", "3").keys() == plain.keys()


def test_tables_and_the_paths_of_pictures(run: Run) -> None:  # noqa: F811
    _plant(run)
    out = run(
        "barrier",
        "a.pt",
        "c.pt",
        *run.arch,
        "--data",
        "data.npz",
        "--align",
        "wb",
        "--points",
        "3",
        "--repair",
        "reset",
        "--plot",
        "curve.png",
        "--plane",
        "plane.pdf",
        "--plane-points",
        "3",
    )
    assert out.split() == ["curve.png", "plane.pdf"]
    for label in ("naive", "naive + reset", "aligned (wb)", "aligned (wb) + reset"):
        assert f"{label}: loss barrier " in run.err


_GIVEN = ("barrier", "a.pt", "b.pt", "--arch", "nets.py:Net", "--data", "data.npz")
_ALIGNED = (*_GIVEN, "--align", "weight-matching")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*_GIVEN, "--plane", "plane.png"), "--plane is about the alignment of B to A, and none is asked for"),
        ((*_GIVEN, "--refine"), "--refine is about the alignment"),
        ((*_GIVEN, "--solver-option", "seed=1"), "--solver-option is about the alignment"),
        ((*_GIVEN, "--repair", "resett"), "Did you mean 'reset'"),
        ((*_ALIGNED, "--plane", "plane.txt"), "is no picture"),
        ((*_ALIGNED, "--plane", "no/plane.png"), "the folder 'no' does not exist"),
        ((*_ALIGNED, "--plane", "same.png", "--plot", "./same.png"), "give each a file of its own"),
        (("barrier", "no.pt", "b.pt", *_ALIGNED[3:], "--plane", "no/plane.png"), "the folder 'no' does not exist"),
        (("barrier", "a.pt", "a.pt", *_ALIGNED[3:], "--plane", "plane.png"), "A and B are equal"),
        ((*_ALIGNED, "--plane", "plane.png"), "B is A with its neurons in another order"),
        (
            (
                "barrier",
                "a.pt",
                "wide.pt",
                "--arch",
                "nets.py:Net",
                "--arch",
                "nets.py:Net?hidden=7",
                "--data",
                "data.npz",
                "--repair",
                "reset",
            ),
            "only models of one architecture and width",
        ),
    ],
)
def test_errors_are_one_message_and_leave_nothing_behind(
    run: Run,  # noqa: F811
    arguments: tuple[str, ...],
    message: str,
) -> None:
    wide = {"fc1": nn.Linear(4, 7), "fc2": nn.Linear(7, 5), "fc3": nn.Linear(5, 3)}
    torch.save(nn.ModuleDict(wide).state_dict(), "wide.pt")
    before = {path.name for path in run.folder.iterdir()}
    assert message in run.fails(*arguments)
    assert {path.name for path in run.folder.iterdir() if path.name != "__pycache__"} == before


@pytest.mark.parametrize("flags", [("--points", "1"), ("--plane-points", "1")])
def test_too_few_points_are_wrong_usage(run: Run, flags: tuple[str, str]) -> None:  # noqa: F811
    assert run(*_GIVEN, *flags, status=2) == ""


def test_a_repair_flattens_the_path_between_trained_networks(run: Run) -> None:  # noqa: F811
    from mergeot_demo.training import train
    from mergeot_zoo.digits import digits

    Path("normed.py").write_text(_NORMED)
    make = resolve_architecture("normed.py:normed")
    inputs, targets = digits("train", batch=10_000)[0]
    for name, seed in (("one.pt", 0), ("two.pt", 1)):
        torch.save(train(make, inputs, targets, seed).state_dict(), name)
    given = ("barrier", "one.pt", "two.pt", "--arch", "normed.py:normed", "--data", "digits", "--points", "5")
    content = run.json(
        *given, "--align", "weight-matching", "--repair", "reset", "--plane", "p.png", "--plane-points", "5"
    )
    naive, aligned, repaired = content, content["aligned"], content["repaired"]
    assert min(naive["accuracy"][0], naive["accuracy"][-1]) > 94
    assert repaired["aligned"]["error_barrier"] < aligned["error_barrier"] < naive["error_barrier"]
    assert repaired["aligned"]["error_barrier"] < repaired["error_barrier"] < naive["error_barrier"]
    for one, other in itertools.combinations((naive, aligned, repaired, repaired["aligned"]), 2):
        assert one["accuracy"][0] == other["accuracy"][0]
        assert one["accuracy"][-1] == pytest.approx(other["accuracy"][-1], abs=0.21)
    models = content["plane"]["models"]
    assert models["fused"]["loss"] == pytest.approx(aligned["loss"][2], rel=1e-4)
    assert models["B"]["loss"] == pytest.approx(models["aligned B"]["loss"], rel=1e-4)
