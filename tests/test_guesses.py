"""Files that do not say what their architecture is: guessed, confirmed, averaged as they stand, or refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mergeot_chains
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mergekit_ot import ArchitectureError, PluginManager, default_manager, load_checkpoint
from mergekit_ot.jobs.aligning import run_align
from mergekit_ot.jobs.connecting import run_barrier
from mergekit_ot.jobs.fusing import run_fuse
from mergekit_ot.jobs.looking import run_eval
from mergekit_ot.recipe import make_recipe
from mergekit_ot.report.outcome import FusionOutcome


@pytest.fixture(scope="module")
def manager() -> PluginManager:
    installed = default_manager()
    if "chain" in installed.guesses:
        return installed
    manager = PluginManager.load()
    manager.register(mergeot_chains, "mergeot_chains")
    return manager


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Sequential, nn.Sequential]:
    """Two perceptrons with tanh, B being A reordered, as bare state dicts."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 3))
    other = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 3))
    first, second = torch.randperm(9), torch.randperm(9)
    state = one.state_dict()
    other.load_state_dict(
        {
            "0.weight": state["0.weight"][first],
            "0.bias": state["0.bias"][first],
            "2.weight": state["2.weight"][second][:, first],
            "2.bias": state["2.bias"][second],
            "4.weight": state["4.weight"][:, second],
            "4.bias": state["4.bias"],
        }
    )
    torch.save(one.state_dict(), "a.pt")
    torch.save(other.state_dict(), "b.pt")
    np.savez("data.npz", x=torch.randn(8, 4).numpy(), y=np.zeros(8, dtype=np.int64))
    return one, other


def _fused(manager: PluginManager, said: list[str], **flags: object) -> FusionOutcome:
    flags = {"models": ["a.pt", "b.pt"], "output": "out.pt", **flags}
    return run_fuse(make_recipe(**flags), manager, said.append)


def test_a_guess_fuses_what_the_true_network_would(files: tuple[nn.Sequential, ...], manager: PluginManager) -> None:
    said: list[str] = []
    _fused(manager, said, solver="weight-matching")
    guesses = [text for text in said if "guessed from names and shapes" in text]
    assert len(guesses) == 2
    assert "a chain of 3 linear layers 4-9-9-3, ReLU between them. Not in the file: the activation" in guesses[0]
    assert guesses[0].endswith("pass --arch SPEC.")
    # B is A in another order, so that their mean is A, under the true activation too.
    fused = load_checkpoint("out.pt", manager)
    assert fused.architecture is None
    model = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 3))
    model.load_state_dict(dict(fused.state))
    inputs = torch.randn(20, 4)
    torch.testing.assert_close(model(inputs), files[0](inputs))


@pytest.mark.parametrize(
    "run",
    [
        lambda manager: _fused(manager, [], repair="reset", data="data.npz"),
        lambda manager: _fused(manager, [], measure="activations", data="data.npz"),
        lambda manager: _fused(manager, [], solver="activation-matching", data="data.npz"),
        lambda manager: _fused(manager, [], data="data.npz"),
        lambda manager: run_eval(["a.pt"], (), "data.npz", "cpu", manager, print),
        lambda manager: run_barrier(make_recipe(models=["a.pt", "b.pt"], data="data.npz"), 3, manager, print),
        lambda manager: run_align(
            make_recipe(models=["a.pt", "b.pt"], solver="activation-matching", data="data.npz"),
            Path("out"),
            manager,
            print,
        ),
    ],
)
@pytest.mark.usefixtures("files")
def test_what_runs_a_network_needs_more_than_a_guess(
    run: Callable[[PluginManager], object], manager: PluginManager
) -> None:
    before = sorted(Path().iterdir())
    with pytest.raises(
        ArchitectureError, match=r"was only guessed \(not in the file: the activation between the layers\)"
    ):
        run(manager)
    assert sorted(Path().iterdir()) == before


@pytest.mark.usefixtures("files")
def test_what_is_confirmed_with_its_activation_is_known(manager: PluginManager) -> None:
    (score,) = run_eval(["a.pt"], ["chain?activation=tanh"], "data.npz", "cpu", manager, print)
    assert score.count == 8
    _fused(manager, [], arch=["chain?activation=tanh"], repair="reset", data="data.npz")
    with pytest.raises(ArchitectureError, match="only guessed"):
        run_eval(["a.pt"], ["chain"], "data.npz", "cpu", manager, print)


def _save(name: str, **tensors: Tensor) -> None:
    torch.save({key.replace("__", "."): value for key, value in tensors.items()}, name)


def test_an_average_needs_no_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    common = {"mask": torch.ones(2, 2).tril().bool(), "step": torch.tensor(3)}
    _save("a.pt", any__thing=torch.ones(2, 3), scale=torch.ones(2).half(), **common)
    _save("b.pt", any__thing=torch.zeros(2, 3), scale=torch.zeros(2).half(), **common)
    _fused(default_manager(), [], solver="average", model_weights=(0.25, 0.75))
    state = load_checkpoint("out.pt").state
    torch.testing.assert_close(state["any.thing"], torch.full((2, 3), 0.25))
    assert state["scale"].tolist() == [0.25, 0.25]
    assert state["scale"].dtype is torch.float16
    assert torch.equal(state["mask"], common["mask"])
    _fused(default_manager(), [], solver="average", model_weights=(0.0, 1.0), report="report")
    assert not load_checkpoint("out.pt").state["any.thing"].any()
    # Other solvers move neurons, and want to know what they are.
    with pytest.raises(ArchitectureError, match="does not say what its architecture is"):
        _fused(default_manager(), [])
    with pytest.raises(ArchitectureError, match="does not say what its architecture is"):
        _fused(default_manager(), [], solver="average", refine=True)


def test_an_average_of_unlike_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _save("a.pt", weight=torch.ones(2, 3), bn__num_batches_tracked=torch.tensor(3))
    _save("b.pt", weight=torch.ones(2, 4))
    _save("c.pt", weights=torch.ones(2, 3))
    _save("d.pt", weight=torch.zeros(2, 3))
    with pytest.raises(ArchitectureError, match=r"'weight' is \(2, 3\) and \(2, 4\)"):
        _fused(default_manager(), [], solver="average")
    with pytest.raises(ArchitectureError, match=r"only one of the two: weight, weights"):
        _fused(default_manager(), [], models=["a.pt", "c.pt"], solver="average")
    _fused(default_manager(), [], models=["a.pt", "d.pt"], solver="average")  # an older file lacks the counter
    assert load_checkpoint("out.pt").state["weight"].tolist() == [[0.5] * 3] * 2


def test_the_package_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "mergekit_ot", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("mergeot ")
