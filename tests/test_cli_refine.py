"""The command line of refinement, restarts and single sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_cli import Run, run  # noqa: F401

from mergekit_ot.api import load_checkpoint

_SHAPE = ("--input-shape", "4")


def outputs(state: dict, x: torch.Tensor) -> torch.Tensor:
    for name in ("fc1", "fc2"):
        x = (x @ state[f"{name}.weight"].T + state[f"{name}.bias"]).relu()
    return x @ state["fc3.weight"].T + state["fc3.bias"]


def test_fuse_refines_and_restarts(run: Run) -> None:  # noqa: F811
    torch.manual_seed(1)
    torch.save({name: torch.randn_like(tensor) for name, tensor in run.a.items()}, "c.pt")
    given = ("fuse", "a.pt", "c.pt", *run.arch, *_SHAPE, "--solver", "weight-matching")
    content = run.json(*given, "--refine", "--restarts", "2", "--report", "report")
    assert {"output", "solver", "groups", "aligned_sources_max_error", "seconds"} <= set(content)
    assert content["aligned_sources_max_error"] < 1e-5
    provenance = load_checkpoint("fused.pt").provenance
    assert (provenance["refine"], provenance["restarts"]) == (True, 2)
    recipe = Path("report/recipe.yaml").read_text()
    assert "refine: true" in recipe
    assert "restarts: 2" in recipe
    again = run.json("fuse", "--recipe", "report/recipe.yaml", "-o", "again.pt", "--report", "again")
    assert again["groups"] == content["groups"]
    one, other = (load_checkpoint(name).state for name in ("fused.pt", "again.pt"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    run(*given, "--refine", "--restarts", "2")
    shown = [line for line in run.err.splitlines() if "Objective of the whole alignment" in line]
    before, after = (float(line.rpartition(": ")[2].rstrip(".")) for line in shown[-2:])
    assert [line.partition(", ")[2].partition(":")[0] for line in shown] == [
        "aligned",
        "before refinement",
        "after refinement",
    ]
    assert after <= before


def test_a_planted_order_is_recovered_with_refinement(run: Run) -> None:  # noqa: F811
    run.json("fuse", "a.pt", "b.pt", *run.arch, *_SHAPE, "--solver", "gwb", "--refine", "--restarts", "2")
    x = torch.randn(20, 4)
    assert torch.allclose(outputs(dict(load_checkpoint("fused.pt").state), x), outputs(run.a, x), atol=1e-5)


@pytest.mark.parametrize("solver", ["wb", "gwb"])
def test_one_source_is_widened_with_its_function(run: Run, solver: str) -> None:  # noqa: F811
    target = "nets.py:Net?hidden=9&other=7"
    content = run.json("fuse", "a.pt", *run.arch, *_SHAPE, "--target", target, "--solver", solver)
    assert sorted(group["size"] for group in content["groups"]) == [7, 9]
    assert content["aligned_sources_max_error"] < 1e-5
    x = torch.randn(20, 4)
    assert torch.allclose(outputs(dict(load_checkpoint("fused.pt").state), x), outputs(run.a, x), atol=1e-5)


def test_one_source_is_compressed(run: Run) -> None:  # noqa: F811
    content = run.json("fuse", "a.pt", *run.arch, *_SHAPE, "--target", "nets.py:Net?hidden=4&other=3")
    assert sorted(group["size"] for group in content["groups"]) == [3, 4]
    assert load_checkpoint("fused.pt").state["fc2.weight"].shape == (3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "at least two models"),
        (("--target", "0"), "with --target SPEC"),
        (("--target", "nets.py:Nett"), "Did you mean 'nets.py:Net'"),
        (("--target", "nets.py:Net?hidden=0"), "has no neurons in 'fc1.weight'"),
        (("--target", "nets.py:Net", "--model-weights", "0.5,0.5"), "2 model weights"),
        (
            ("--target", "nets.py:Net", "--solver-option", "members=last"),
            "Option members of solver 'wb' is 'last': 'all' or 'first'",
        ),
        (
            ("--target", "nets.py:Net", "--solver-option", "scaling=other"),
            "Option scaling of solver 'wb' is 'other': 'density' or 'paper'",
        ),
    ],
)
def test_errors_of_a_single_source(run: Run, arguments: tuple[str, ...], message: str) -> None:  # noqa: F811
    assert message in run.fails("fuse", "a.pt", "-o", "out.pt", *run.arch, *_SHAPE, *arguments)
    assert not Path("out.pt").exists()


def test_restarts_are_counted_from_one(run: Run) -> None:  # noqa: F811
    assert run("fuse", "a.pt", "b.pt", *run.arch, "--restarts", "0", status=2) == ""
    Path("fuse.yaml").write_text(json.dumps({"models": ["a.pt", "b.pt"], "arch": "nets.py:Net", "restarts": 0}))
    assert "restarts" in run.fails("fuse", "--recipe", "fuse.yaml", "-o", "out.pt", *_SHAPE)
    Path("fuse.yaml").write_text(json.dumps({"models": ["a.pt", "b.pt"], "arch": "nets.py:Net", "refine": "maybe"}))
    assert "refine" in run.fails("fuse", "--recipe", "fuse.yaml", "-o", "out.pt", *_SHAPE)
