"""The command line: flags, JSON shapes, exit statuses, and errors before any work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

from mergekit_ot.api import load_checkpoint, save_checkpoint
from mergekit_ot.cli.app import main

_NETS = """
import torch
from torch import nn
print("this file talks")

class Net(nn.Module):
    def __init__(self, hidden=6, other=5):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(4, hidden), nn.Linear(hidden, other), nn.Linear(other, 3)

    def forward(self, x):
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())

def image_net():
    return nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 28 * 28, 2))

def picky():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)
        def forward(self, x):
            if x.shape[1:] != (7, 4):
                raise ValueError("seven rows, please")
            return self.fc(x)
    return Picky()

def line():
    return nn.Linear(4, 3)

def breaks():
    class Breaks(dict):
        pass
    return Breaks()
"""


class Run:
    """A folder with two networks in it: B is A with its neurons reordered; and a way to run commands there."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        (folder / "nets.py").write_text(_NETS)
        torch.manual_seed(0)
        state = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)).state_dict()
        self.a = {f"fc{int(name[0]) + 1}{name[1:]}": 3 * value for name, value in state.items()}
        first, second = torch.tensor([3, 1, 5, 0, 4, 2]), torch.tensor([4, 2, 0, 1, 3])
        self.b = {
            "fc1.weight": self.a["fc1.weight"][first],
            "fc1.bias": self.a["fc1.bias"][first],
            "fc2.weight": self.a["fc2.weight"][second][:, first],
            "fc2.bias": self.a["fc2.bias"][second],
            "fc3.weight": self.a["fc3.weight"][:, second],
            "fc3.bias": self.a["fc3.bias"],
        }
        torch.save(self.a, folder / "a.pt")
        torch.save({"state_dict": self.b, "epoch": 1}, folder / "b.pt")
        # The labels are what A says, so that anything between A and a reordered A is worse.
        x = torch.randn(70, 4)
        labels = _outputs(self.a, x).argmax(1)
        parts = {"x_train": x[:40], "y_train": labels[:40], "x_test": x[40:], "y_test": labels[40:]}
        np.savez(folder / "data.npz", **{name: part.numpy() for name, part in parts.items()})  # type: ignore[arg-type]
        self.arch = ("--arch", "nets.py:Net")

    def __call__(self, *arguments: str, status: int = 0) -> str:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        out, self.err = self.capsys.readouterr()
        assert (stopped.value.code or 0) == status, self.err
        return out

    def json(self, *arguments: str) -> dict:
        out = self(*arguments, "--json")
        assert len(out.splitlines()) == 1
        return json.loads(out)

    def fails(self, *arguments: str) -> str:
        assert self(*arguments, status=1) == ""
        message = [line for line in self.err.splitlines() if line.startswith("mergeot: error: ")]
        assert len(message) == 1
        assert "Traceback" not in self.err
        assert "internal error" not in self.err
        return message[0]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return Run(tmp_path, capsys)


def _outputs(state: dict, x: torch.Tensor) -> torch.Tensor:
    hidden = (x @ state["fc1.weight"].T + state["fc1.bias"]).relu()
    return (hidden @ state["fc2.weight"].T + state["fc2.bias"]).relu() @ state["fc3.weight"].T + state["fc3.bias"]


def test_eval_scores_every_model(run: Run) -> None:
    content = run.json("eval", "a.pt", "b.pt", *run.arch, "--data", "data.npz")
    assert set(content) == {"models"}
    assert [model["path"] for model in content["models"]] == ["a.pt", "b.pt"]
    one, other = content["models"]
    assert set(one) == {"path", "loss", "accuracy", "count"}
    assert one["count"] == 30
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    with np.load("data.npz") as data:
        x, y = torch.from_numpy(data["x_test"]).float(), torch.from_numpy(data["y_test"])
    assert one["loss"] == pytest.approx(nn.functional.cross_entropy(_outputs(run.a, x), y).item(), rel=1e-5)
    run("eval", "a.pt", *run.arch, "--data", "data.npz")
    assert f"{one['accuracy']:.2f} %" in run.err


@pytest.mark.parametrize("solver", ["wb", "weight-matching"])
def test_fuse_recovers_a_planted_order_and_writes_what_it_says(run: Run, solver: str) -> None:
    content = run.json("fuse", "a.pt", "b.pt", "-o", "fused.pt", "--solver", solver, *run.arch, "--input-shape", "4")
    extent = {"aligned_groups", "neuron_groups", "pinned_weights_percent", "pinned_because"}
    told = {"notes", "warnings"}
    assert set(content) == {"output", "solver", "groups", "aligned_sources_max_error", "seconds", *extent, *told}
    assert (content["output"], content["solver"]) == ("fused.pt", solver)
    assert all(set(group) == {"name", "size", "cost", "status", "solver"} for group in content["groups"])
    assert sorted(group["size"] for group in content["groups"]) == [5, 6]
    assert content["aligned_sources_max_error"] < 1e-5
    fused = load_checkpoint("fused.pt")
    x = torch.randn(20, 4)
    assert torch.allclose(_outputs(dict(fused.state), x), _outputs(run.a, x), atol=1e-5)
    assert fused.architecture is None
    assert fused.provenance["solver"] == solver
    assert [source["sha256"] for source in fused.provenance["sources"]] == [
        load_checkpoint(name).sha256 for name in ("a.pt", "b.pt")
    ]


def test_checkpoints_that_carry_their_architecture_need_no_flag(run: Run) -> None:
    for name, state in (("a", run.a), ("b", run.b)):
        save_checkpoint(state, f"own-{name}.pt", architecture="mlp", arguments={"sizes": "4-6-5-3"}, input_shape=(4,))
    run.json("fuse", "own-a.pt", "own-b.pt")
    fused = load_checkpoint("fused.pt")
    assert (fused.architecture, fused.arguments, fused.input_shape) == ("mlp", {"sizes": "4-6-5-3"}, (4,))
    assert run.json("check", "fused.pt")["preserved"] is True


def test_widths_may_differ_and_the_target_decides(run: Run) -> None:
    torch.manual_seed(1)
    wide = {
        "fc1.weight": torch.randn(9, 4),
        "fc1.bias": torch.randn(9),
        "fc2.weight": torch.randn(7, 9),
        "fc2.bias": torch.randn(7),
        "fc3.weight": torch.randn(3, 7),
        "fc3.bias": torch.randn(3),
    }
    torch.save(wide, "wide.pt")
    both = (*run.arch, "--arch", "nets.py:Net?hidden=9&other=7", "--data", "data.npz")
    for target, sizes in (("0", [5, 6]), ("1", [7, 9]), ("nets.py:Net?hidden=3&other=2", [2, 3])):
        content = run.json("fuse", "a.pt", "wide.pt", *both, "--target", target)
        assert sorted(group["size"] for group in content["groups"]) == sizes


def test_model_weight_of_one_returns_that_source(run: Run) -> None:
    run.json("fuse", "a.pt", "b.pt", *run.arch, "--model-weights", "0,1", "--input-shape", "4")
    x = torch.randn(20, 4)
    assert torch.allclose(_outputs(dict(load_checkpoint("fused.pt").state), x), _outputs(run.b, x), atol=1e-5)


def test_dry_run_writes_nothing(run: Run) -> None:
    before = set(run.folder.iterdir())
    content = run.json("fuse", "a.pt", "b.pt", *run.arch, "--dry-run", "--report", "report")
    assert content["output"] is None
    assert sorted(group["size"] for group in content["groups"]) == [5, 6]
    assert {group["status"] for group in content["groups"]} == {"planned"}
    assert [step["groups"] for step in content["plan"]] == [group["name"] for group in content["groups"]]
    assert {path for path in run.folder.iterdir() if path.name != "__pycache__"} == before


def test_recipe_and_report(run: Run) -> None:
    Path("fuse.yaml").write_text("models: [a.pt, b.pt]\nsolver: average\narch: nets.py:Net\ninput_shape: [4]\n")
    content = run.json("fuse", "--recipe", "fuse.yaml", "--solver", "wb", "--report", "report", "-o", "out.pt")
    assert content["solver"] == "wb"
    assert Path("out.pt").exists()
    report = json.loads(Path("report/report.json").read_text())
    assert {key: report[key] for key in content} == content
    assert "solver" not in Path("report/recipe.yaml").read_text()  # wb is the default
    assert "fc1.weight" in Path("report/report.md").read_text()


def test_align_keeps_the_function_and_takes_the_order(run: Run) -> None:
    content = run.json("align", "a.pt", "b.pt", "b.pt", "-o", "aligned", *run.arch, "--input-shape", "4")
    assert [output["path"] for output in content["outputs"]] == ["aligned/b.pt", "aligned/b-2.pt"]
    assert content["reference"] == "a.pt"
    assert content["outputs"][0]["max_error"] < 1e-5
    aligned = load_checkpoint("aligned/b.pt").state
    assert all(torch.allclose(aligned[name], run.a[name], atol=1e-6) for name in run.a)


def test_align_refuses_other_widths(run: Run) -> None:
    message = run.fails("align", "a.pt", "b.pt", "-o", "aligned", *run.arch, "--arch", "nets.py:Net?hidden=9")
    assert "does not fit" in message
    torch.save(
        {**run.b, "fc1.weight": torch.ones(2, 4), "fc1.bias": torch.ones(2), "fc2.weight": torch.ones(5, 2)}, "c.pt"
    )
    message = run.fails("align", "a.pt", "c.pt", "-o", "aligned", *run.arch, "--arch", "nets.py:Net?hidden=2")
    assert "differ in width" in message
    assert not Path("aligned").exists()


def test_check_counts(run: Run) -> None:
    content = run.json("check", "a.pt", *run.arch)
    counts = {"groups", "families", "certified", "pinned", "max_error", "preserved"}
    assert set(content) == {*counts, "symmetries", "refusals"}
    assert (content["groups"], content["certified"], content["preserved"]) == (2, 2, True)
    assert content["max_error"] < 1e-10


def test_check_of_a_model_without_free_groups_is_no_pass(run: Run) -> None:
    torch.save(nn.Linear(4, 3).state_dict(), "line.pt")
    content = run.json("check", "line.pt", "--arch", "nets.py:line")
    assert content["preserved"] is None
    assert content["groups"] == 0
    run("check", "line.pt", "--arch", "nets.py:line")
    assert "Nothing found" in run.err


def test_inspect_draws_every_group(run: Run) -> None:
    content = run.json("inspect", "a.pt", *run.arch, "--svg", "groups.svg", "--dot", "groups.dot")
    free = [group["name"] for group in content["groups"] if group["status"] == "free"]
    assert sorted(free) == ["fc1.weight:0", "fc2.weight:0"]
    texts = [element.text for element in ElementTree.parse("groups.svg").iter() if element.text]
    assert all(name in texts for name in free)
    assert "6 neurons" in texts
    assert '"fc1.weight:0" -> "fc2.weight:0" [label="fc2.weight"]' in Path("groups.dot").read_text()


def test_barrier_of_a_reordered_copy_vanishes_when_aligned(run: Run) -> None:
    content = run.json(
        "barrier",
        "a.pt",
        "b.pt",
        *run.arch,
        "--data",
        "data.npz",
        "--align",
        "weight-matching",
        "--points",
        "5",
        "--plot",
        "curve.png",
    )
    keys = {"t", "loss", "accuracy", "loss_barrier", "error_barrier"}
    assert set(content) == keys | {"aligned"}
    assert set(content["aligned"]) == keys
    assert content["t"] == [0, 0.25, 0.5, 0.75, 1]
    assert content["loss_barrier"] > 1e-3 > 1e-6 > content["aligned"]["loss_barrier"]
    assert content["aligned"]["loss"] == pytest.approx([content["loss"][0]] * 5, rel=1e-4)
    assert Path("curve.png").stat().st_size > 5000
    assert run.json("barrier", "a.pt", "b.pt", *run.arch, "--data", "data.npz")["aligned"] is None


def test_json_has_no_nan(run: Run) -> None:
    large = {name: value * 1e30 for name, value in run.b.items()}
    torch.save(large, "large.pt")
    content = run.json("eval", "large.pt", *run.arch, "--data", "data.npz")
    assert content["models"][0]["loss"] is None


def test_plugins_lists_what_is_registered(run: Run) -> None:
    content = run.json("plugins")
    assert {"wb", "weight-matching", "average"} <= set(content["solvers"])
    assert "weights" in content["measures"]
    assert content["rules"]
    assert all(set(plugin) == {"name", "version", "distribution", "hooks"} for plugin in content["plugins"])
    run("plugins")
    assert "weight-matching" in run.err


_FUSE = ("fuse", "a.pt", "b.pt", "-o", "out.pt", "--input-shape", "4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fuse", "a.pt", "bb.pt", "-o", "out.pt"), "Did you mean '"),
        (("fuse", "a.pt", "-o", "out.pt"), "at least two models"),
        (("fuse", "strange.pt", "b.pt", "-o", "out.pt"), "'strange.pt' does not say what its architecture is"),
        (("fuse", "strange.pt", "b.pt", "-o", "out.pt"), "Pass --arch SPEC: the class or function that builds"),
        ((*_FUSE, "--arch", "nets.py:Nett"), "Did you mean 'nets.py:Net'"),
        ((*_FUSE, "--arch", "nets.py:Net?hidden=7"), "'fc1.weight' is 6×4 in the file and 7×4 in the architecture"),
        ((*_FUSE, "--arch", "nets.py:line"), "Missing in the file: weight, bias. Not in the architecture: fc1.weight"),
        ((*_FUSE, "--arch", "nets.py:breaks"), "returned a Breaks, not a torch.nn.Module"),
        ((*_FUSE, "--arch", "nets.py:Net", "--solver", "wbb"), "Unknown solver 'wbb'. Did you mean 'wb'"),
        (("fuse", "a.pt", "no.pt", "--executor", "cereal"), "Unknown executor 'cereal'. Did you mean 'serial'"),
        ((*_FUSE, "--arch", "nets.py:Net", "--solver-option", "no_such=1"), "no_such"),
        ((*_FUSE, "--arch", "nets.py:Net", "--measure", "weight"), "Did you mean 'weights'"),
        ((*_FUSE, "--arch", "nets.py:Net", "--repair", "magic"), "Unknown repair 'magic'"),
        ((*_FUSE, "--arch", "nets.py:Net", "--measure", "activations"), "data"),
        ((*_FUSE, "--arch", "nets.py:Net", "--model-weights", "0,0"), "sum to 0: some model has to count"),
        ((*_FUSE, "--arch", "nets.py:Net", "--model-weights", "1"), "1 model weights"),
        ((*_FUSE, "--arch", "nets.py:Net", "--target", "2"), "target 2 does not exist"),
        ((*_FUSE, "--arch", "nets.py:Net", "--target", "nets.py:Net?other=0"), "has no neurons in 'fc2.weight'"),
        ((*_FUSE, "--arch", "nets.py:Net", "--device", "gpu7"), "Unknown device 'gpu7'"),
        ((*_FUSE, "--arch", "nets.py:Net", "--data", "dat.npz"), "Did you mean 'data.npz'"),
        ((*_FUSE, "--recipe", "no.yaml"), "no file 'no.yaml'"),
        (("fuse", "a.pt", "b.pt", "-o", "a.pt", "--arch", "nets.py:Net"), "is the input 'a.pt'"),
        (("fuse", "a.pt", "b.pt", "-o", "no/out.pt", "--arch", "nets.py:Net"), "the folder 'no' does not exist"),
        (
            ("fuse", "a.pt", "b.pt", "-o", "out.pt", "--arch", "nets.py:Net", "--input-shape", "9"),
            "does not accept inputs",
        ),
        (("check", "nan.pt", "--arch", "nets.py:Net"), "Tensor 'fc2.bias' of 'nan.pt' has 1 of 5 entries"),
        (("eval", "a.pt", "--arch", "nets.py:Net", "--data", "nets.py:line"), "returned a Linear"),
        (
            ("barrier", "a.pt", "b.pt", "--arch", "nets.py:Net", "--data", "data.npz", "--plot", "a.txt"),
            "is no picture",
        ),
    ],
)
def test_errors_are_one_message_and_leave_nothing_behind(run: Run, arguments: tuple[str, ...], message: str) -> None:
    torch.save({**run.a, "fc2.bias": torch.tensor([0, 0, float("nan"), 0, 0])}, "nan.pt")
    torch.save({name.replace("fc", "strange"): tensor for name, tensor in run.a.items()}, "strange.pt")
    before = {path.name: path.stat().st_size for path in run.folder.iterdir()}
    assert message in run.fails(*arguments)
    after = {path.name: path.stat().st_size for path in run.folder.iterdir() if path.name != "__pycache__"}
    assert after == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("fuse",),
        ("fuse", "a.pt", "b.pt", "--no-such-flag"),
        ("fuse", "a.pt", "b.pt", "--model-weights", "half,half"),
        ("fuse", "a.pt", "b.pt", "--input-shape", "4,0"),
        ("fuse", "a.pt", "b.pt", "--solver-option", "epsilon"),
        ("eval", "a.pt"),
        ("align", "a.pt", "b.pt"),
        ("no-such-command",),
    ],
)
def test_wrong_usage_ends_with_two(run: Run, arguments: tuple[str, ...]) -> None:
    assert run(*arguments, status=2) == ""
    assert "Traceback" not in run.err


def test_unforeseen_errors_ask_for_a_report(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import mergekit_ot.jobs.looking as looking

    def breaks(*_: object) -> None:
        raise ZeroDivisionError("nobody thought of this")

    monkeypatch.setattr(looking, "run_eval", breaks)
    monkeypatch.delenv("MERGEOT_DEBUG", raising=False)
    run("eval", "a.pt", "--data", "data.npz", status=1)
    assert "internal error: ZeroDivisionError: nobody thought of this" in run.err
    assert "report it" in run.err
    assert "Traceback" not in run.err
    monkeypatch.setenv("MERGEOT_DEBUG", "1")
    run("eval", "a.pt", "--data", "data.npz", status=1)
    assert "Traceback" in run.err


def test_input_shape_is_inferred_and_said(run: Run) -> None:
    torch.manual_seed(0)
    torch.save(
        nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 28 * 28, 2)).state_dict(), "i.pt"
    )
    run("check", "i.pt", "--arch", "nets.py:image_net")
    assert "3,32,32 (numbers) is the first plausible one" in run.err
    run("check", "a.pt", *run.arch, "--data", "data.npz")
    assert "plausible" not in run.err
    torch.save(nn.Linear(4, 2).state_dict(), "picky.pt")
    torch.save({f"fc.{name}": value for name, value in nn.Linear(4, 2).state_dict().items()}, "picky.pt")
    assert "Pass the shape of one input" in run.fails("check", "picky.pt", "--arch", "nets.py:picky")
    run("check", "picky.pt", "--arch", "nets.py:picky", "--input-shape", "7,4")


def test_help_teaches_by_example(run: Run) -> None:
    for command in ("fuse", "align", "check", "inspect", "eval", "barrier", "plugins"):
        assert f"mergeot {command} " in run(command, "--help")


@pytest.mark.parametrize("arguments", [("--help",), ("plugins",), ("fuse", "--help")])
def test_listing_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    heavy = ("torch", "numpy", "scipy", "networkx", "sklearn", "matplotlib", "ot")
    code = (
        "import sys\nfrom mergekit_ot.cli.app import main\n"
        f"try:\n    main({list(arguments)!r})\nexcept SystemExit:\n    pass\n"
        f"sys.exit(', '.join(name for name in {heavy!r} if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-300:]
