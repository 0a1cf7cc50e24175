"""The demonstration: train two networks, fuse them with every solver, compare, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_ot import (
    Architecture,
    FusionResult,
    MergeotError,
    PluginManager,
    barrier,
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
    solver: str
    accuracy: float
    result: FusionResult


def run_demo(
    folder: Path, seed: int, notify: Callable[[str], None], manager: PluginManager | None = None
) -> DemoResult:
    """Runs the demonstration.

    Args:
        folder: Where the files go; it is created.
        seed: Seed of the trainings (the second uses the next one) and of the fusions.
        notify: Told what happens.
        manager: Whose architecture and solvers are used; the installed plugins by default.

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
    calibration, test = (list(resolve_data(DATA, manager, split)()) for split in ("train", "test"))
    inputs, targets = (torch.cat(parts) for parts in zip(*calibration, strict=True))
    notify(f"Training two networks on {len(inputs)} digits, from different seeds …")
    sources = [train(make, inputs, targets, seed + offset) for offset in (0, 1)]
    rows = _source_rows(sources, make, test)
    fused, more = _fuse_all(sources, make, calibration, test, seed, manager, notify)
    best = max(fused, key=lambda one: one.accuracy)
    more += _repaired(sources, best.solver, calibration, test, seed, manager, notify)
    rows = (*rows, *more, Row("ensemble of the two", evaluate(_Ensemble(sources), test).accuracy, None, "two networks"))
    files = _save(folder, sources, best, make, seed, manager)
    naive, aligned = _barriers(folder / "barrier.png", make, sources, fused, test)
    return DemoResult(
        rows, best.solver, naive, aligned, str(folder / "barrier.png"), files, _next_commands(folder, best.solver),
        time.perf_counter() - started,
    )  # fmt: skip


class _Ensemble(nn.Module):
    """The mean of the networks' probabilities, as log-probabilities."""

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack([model(inputs).softmax(1) for model in self.models]).mean(0).log()


def _source_rows(sources: list[nn.Module], make: Architecture, test: Batches) -> tuple[Row, ...]:
    naive = make()
    state_a, state_b = (source.state_dict() for source in sources)
    naive.load_state_dict({name: (value + state_b[name]) / 2 for name, value in state_a.items()})
    names = ("source A", "source B", "naive average")
    scores = evaluate([*sources, naive], test)
    remarks = ("", "", "neurons in different order")
    return tuple(Row(*row) for row in zip(names, [s.accuracy for s in scores], (None,) * 3, remarks, strict=True))


def _fuse_all(
    sources: list[nn.Module],
    make: Architecture,
    calibration: Batches,
    test: Batches,
    seed: int,
    manager: PluginManager,
    notify: Callable[[str], None],
) -> tuple[list[_Fused], list[Row]]:
    fused, rows = [], []
    for solver in sorted(manager.solvers):
        notify(f"Fusing with {solver} …")
        try:
            result, accuracy, seconds = _fuse(sources, solver, "none", calibration, test, seed, manager)
        except MergeotError as error:
            rows.append(Row(f"fused, {solver}", None, None, str(error)[:60]))
            continue
        fused.append(_Fused(solver, accuracy, result))
        rows.append(Row(f"fused, {solver}", accuracy, seconds, "one network"))
    if not fused:
        raise MergeotError("No solver could fuse the two networks. See 'mergeot plugins' for what is installed.")
    return fused, rows


def _fuse(
    sources: list[nn.Module],
    solver: str,
    repair: str,
    calibration: Batches,
    test: Batches,
    seed: int,
    manager: PluginManager,
) -> tuple[FusionResult, float, float]:
    """Returns a fusion, its accuracy and its seconds."""
    started = time.perf_counter()
    result = fuse(
        sources, solver=solver, example_inputs=calibration[0][0][:2], data=calibration, seed=seed, repair=repair,
        device="cpu", manager=manager,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    return result, evaluate(result.model(), test).accuracy or 0.0, seconds


def _repaired(
    sources: list[nn.Module],
    solver: str,
    calibration: Batches,
    test: Batches,
    seed: int,
    manager: PluginManager,
    notify: Callable[[str], None],
) -> list[Row]:
    """Returns a row for the best solver with the repair, where that is installed."""
    if _REPAIR not in manager.repairs:
        return []
    notify(f"Fusing with {solver}, and repairing with {_REPAIR} …")
    _, accuracy, seconds = _fuse(sources, solver, _REPAIR, calibration, test, seed, manager)
    return [Row(f"fused, {solver}, {_REPAIR}", accuracy, seconds, "one network, unlabelled inputs")]


def _save(
    folder: Path, sources: list[nn.Module], best: _Fused, make: Architecture, seed: int, manager: PluginManager
) -> tuple[str, ...]:
    contents: list[tuple[str, State, dict[str, Any]]] = [
        (f"source-{letter}.pt", source.state_dict(), {"trained_on": "digits", "seed": seed + offset})
        for offset, (letter, source) in enumerate(zip("ab", sources, strict=True))
    ]
    contents.append(("fused.pt", best.result.state, {"solver": best.solver, "seed": seed}))
    for name, state, provenance in contents:
        save_checkpoint(
            state, folder / name, architecture=make.name, arguments=make.arguments, input_shape=(1, 8, 8),
            provenance=provenance, manager=manager,
        )  # fmt: skip
    return tuple(str(folder / name) for name in (*(content[0] for content in contents), "barrier.png"))


def _barriers(
    picture: Path, make: Architecture, sources: list[nn.Module], fused: list[_Fused], test: Batches
) -> tuple[float | None, float | None]:
    state_a, state_b = (source.state_dict() for source in sources)
    naive = barrier(make(), state_a, state_b, test, _POINTS)
    curves = {"naive": naive}
    # A soft plan gives no order, so there is no path between aligned sources to draw.
    ordered = [one for one in fused if all(map(one.result.alignment.is_function_preserving, (0, 1)))]
    aligned = None
    if ordered:
        best = max(ordered, key=lambda one: one.accuracy)
        aligned = barrier(make(), best.result.aligned_state(0), best.result.aligned_state(1), test, _POINTS)
        curves[f"aligned ({best.solver})"] = aligned
    plot_barrier(curves, picture, "Between two networks trained on the digits")
    return naive["error_barrier"], None if aligned is None else aligned["error_barrier"]


def _next_commands(folder: Path, solver: str) -> tuple[tuple[str, ...], ...]:
    a, b, fused, mine = (str(folder / name) for name in ("source-a.pt", "source-b.pt", "fused.pt", "mine.pt"))
    return (
        ("mergeot", "eval", a, b, fused, "--data", DATA),
        ("mergeot", "fuse", a, b, "-o", mine, "--solver", solver, "--data", DATA, "--repair", _REPAIR),
        ("mergeot", "barrier", a, b, "--data", DATA, "--align", solver, "--plot", str(folder / "again.png")),
        ("mergeot", "check", fused),
    )
