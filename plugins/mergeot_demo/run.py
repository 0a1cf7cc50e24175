"""The demonstration: train two networks, fuse them with every solver, compare, save."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_ot import (
    Architecture,
    FusionResult,
    MergeotError,
    Notify,
    PluginManager,
    barrier,
    check_output,
    default_manager,
    evaluate,
    fuse,
    plot_barrier,
    resolve_architecture,
    resolve_data,
    save_checkpoint,
)
from mergeot_demo.training import train

ARCHITECTURE = "mlp"
# Three hidden layers: deep enough for the naive average to break.
ARGUMENTS: dict[str, Any] = {"sizes": "64-64-64-64-10"}
DATA = "digits"
_REPAIR = "refit"
_POINTS = 21
# Training digits that no network is trained on, a tenth of all 1,797: they choose what is shown, so that the test
# digits only measure it.
_HELD_BACK = 180
_BATCH = 256
_FILES = ("source-a.pt", "source-b.pt", "fused.pt", "barrier.png")

Batches = list[tuple[Tensor, Tensor]]
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One network in the table."""

    name: str
    accuracy: float | None
    seconds: float | None = None
    remark: str = ""


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration measured and wrote."""

    rows: tuple[Row, ...]
    best: str
    naive_barrier: float | None
    aligned_barrier: float | None
    picture: str
    files: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Returns the object of ``mergeot demo --json``."""
        return {**asdict(self), "commands": [list(command) for command in self.commands]}


@dataclass(frozen=True)
class _Fused:
    """A fusion: its accuracy on the held-back digits, by which it is chosen, and on the test digits."""

    solver: str
    held_back: float
    accuracy: float
    seconds: float
    result: FusionResult


@dataclass(frozen=True)
class _Digits:
    """Three parts of the digits that share none: to train and calibrate on, to choose by, and to measure on."""

    training: Batches
    held_back: Batches
    test: Batches


@dataclass(frozen=True)
class _Task:
    """What is fused, and by what."""

    sources: list[nn.Module]
    make: Architecture
    digits: _Digits
    seed: int
    manager: PluginManager
    notify: Notify
    overwrite: bool


def run_demo(
    folder: Path, seed: int, notify: Notify, manager: PluginManager | None = None, *, overwrite: bool = False
) -> DemoResult:
    """Runs the demonstration.

    Args:
        folder: Where the files go; it is created.
        seed: Seed of the trainings (the second uses the next one) and of the fusions.
        notify: Told what happens.
        manager: Whose architecture and solvers are used; the installed plugins by default.
        overwrite: Whether files that mergeot did not write may be replaced.

    Raises:
        MergeotError: The folder cannot be written, or no solver could fuse the two.
    """
    started = time.perf_counter()
    manager = manager or default_manager()
    make = resolve_architecture(ARCHITECTURE, manager, ARGUMENTS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MergeotError(f"Cannot create '{folder}': {error.strerror}. Choose another --output.") from error
    for name in _FILES:
        check_output(folder / name, overwrite=overwrite)
    digits = _divided(manager)
    inputs, targets = _joined(digits.training)
    notify(f"Training two networks on {len(inputs)} digits, from different seeds …")
    sources = [train(make, inputs, targets, seed + offset) for offset in (0, 1)]
    task = _Task(sources, make, digits, seed, manager, notify, overwrite)
    rows = _source_rows(task)
    fused, of_solvers = _fuse_all(task)
    best = max(fused, key=lambda fusion: fusion.held_back)
    rows += of_solvers + _repaired(task, best.solver)
    rows.append(Row("ensemble of the two", evaluate(_Ensemble(sources), digits.test).accuracy, None, "two networks"))
    picture = folder / "barrier.png"
    files = _save(folder, task, best)
    naive, aligned = _barriers(picture, task, fused)
    commands, seconds = _next_commands(folder, best.solver), time.perf_counter() - started
    return DemoResult(tuple(rows), best.solver, naive, aligned, str(picture), files, commands, seconds)


def _divided(manager: PluginManager) -> _Digits:
    """Returns the digits in three parts; the last training digits are held back."""
    train_batches, test = (
        [(inputs, targets) for inputs, targets in resolve_data(DATA, manager, split)() if targets is not None]
        for split in ("train", "test")
    )
    inputs, targets = _joined(train_batches)
    training = zip(inputs[:-_HELD_BACK].split(_BATCH), targets[:-_HELD_BACK].split(_BATCH), strict=True)
    return _Digits(list(training), [(inputs[-_HELD_BACK:], targets[-_HELD_BACK:])], test)


def _joined(batches: Batches) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)


class _Ensemble(nn.Module):
    """The mean of the networks' probabilities, as log-probabilities."""

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack([model(inputs).softmax(1) for model in self.models]).mean(0).log()


def _source_rows(task: _Task) -> list[Row]:
    naive = task.make()
    state_a, state_b = (source.state_dict() for source in task.sources)
    naive.load_state_dict({name: (value + state_b[name]) / 2 for name, value in state_a.items()})
    score_a, score_b, score_naive = evaluate([*task.sources, naive], task.digits.test)
    return [
        Row("source A", score_a.accuracy),
        Row("source B", score_b.accuracy),
        Row("naive average", score_naive.accuracy, None, "neurons in different order"),
    ]


def _fuse_all(task: _Task) -> tuple[list[_Fused], list[Row]]:
    """Returns what every solver makes of the two, and its rows, those of solvers that cannot included."""
    fused, rows = [], []
    for solver in sorted(task.manager.solvers):
        task.notify(f"Fusing with {solver} …")
        try:
            fusion = _fuse(task, solver, "none")
        except MergeotError as error:
            rows.append(Row(f"fused, {solver}", None, None, str(error)[:60]))
            continue
        fused.append(fusion)
        rows.append(Row(f"fused, {solver}", fusion.accuracy, fusion.seconds, "one network"))
    if not fused:
        raise MergeotError("No solver could fuse the two networks. See 'mergeot plugins' for what is installed.")
    return fused, rows


def _fuse(task: _Task, solver: str, repair: str) -> _Fused:
    started = time.perf_counter()
    result = fuse(
        task.sources,
        solver=solver,
        example_inputs=task.digits.training[0][0][:2],
        data=task.digits.training,
        seed=task.seed,
        repair=repair,
        device="cpu",
        manager=task.manager,
    )
    seconds = time.perf_counter() - started
    model = result.model()
    held_back, test = (
        evaluate(model, batches).accuracy or 0.0 for batches in (task.digits.held_back, task.digits.test)
    )
    return _Fused(solver, held_back, test, seconds, result)


def _repaired(task: _Task, solver: str) -> list[Row]:
    """Returns a row for the best solver with the repair, where that is installed."""
    if _REPAIR not in task.manager.repairs:
        return []
    task.notify(f"Fusing with {solver}, and repairing with {_REPAIR} …")
    fusion = _fuse(task, solver, _REPAIR)
    name = f"fused, {solver}, {_REPAIR}"
    return [Row(name, fusion.accuracy, fusion.seconds, "one network, unlabelled inputs")]


def _save(folder: Path, task: _Task, best: _Fused) -> tuple[str, ...]:
    contents: list[tuple[str, State, dict[str, Any]]] = []
    for offset, (letter, source) in enumerate(zip("ab", task.sources, strict=True)):
        provenance = {"trained_on": "digits", "seed": task.seed + offset}
        contents.append((f"source-{letter}.pt", source.state_dict(), provenance))
    contents.append(("fused.pt", best.result.state, {"solver": best.solver, "seed": task.seed}))
    for name, state, provenance in contents:
        save_checkpoint(
            state,
            folder / name,
            architecture=task.make.name,
            arguments=task.make.arguments,
            input_shape=(1, 8, 8),
            provenance=provenance,
            overwrite=task.overwrite,
            manager=task.manager,
        )
    return tuple(str(folder / name) for name in _FILES)


def _barriers(picture: Path, task: _Task, fused: list[_Fused]) -> tuple[float | None, float | None]:
    make, test = task.make, task.digits.test
    state_a, state_b = (source.state_dict() for source in task.sources)
    naive = barrier(make(), state_a, state_b, test, _POINTS)
    curves = {"naive": naive}
    # A soft plan gives no order, so there is no path between aligned sources to draw.
    ordered = [fusion for fusion in fused if all(map(fusion.result.alignment.is_function_preserving, (0, 1)))]
    aligned = None
    if ordered:
        best = max(ordered, key=lambda fusion: fusion.held_back)
        aligned = barrier(make(), best.result.aligned_state(0), best.result.aligned_state(1), test, _POINTS)
        curves[f"aligned ({best.solver})"] = aligned
    plot_barrier(curves, picture, "Between two networks trained on the digits", overwrite=task.overwrite)
    return naive["error_barrier"], None if aligned is None else aligned["error_barrier"]


def _next_commands(folder: Path, solver: str) -> tuple[tuple[str, ...], ...]:
    a, b, fused, mine = (str(folder / name) for name in ("source-a.pt", "source-b.pt", "fused.pt", "mine.pt"))
    return (
        ("mergeot", "eval", a, b, fused, "--data", DATA),
        ("mergeot", "fuse", a, b, "-o", mine, "--solver", solver, "--data", DATA, "--repair", _REPAIR),
        ("mergeot", "barrier", a, b, "--data", DATA, "--align", solver, "--plot", str(folder / "again.png")),
        ("mergeot", "check", fused),
    )
