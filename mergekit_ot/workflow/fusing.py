"""Fuse checkpoints as a recipe says: check what can fail, read, fuse, save, report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_ot.checkpoint import save_checkpoint
from mergekit_ot.datasets import TRAIN, resolve_data
from mergekit_ot.errors import CheckpointError, MergeotError
from mergekit_ot.evaluation import choose_device
from mergekit_ot.files import check_writable
from mergekit_ot.fusion.engine import fuse
from mergekit_ot.fusion.result import FusionResult
from mergekit_ot.fusion.setup import REFINEMENT
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.graph.front_end import TraceLimits
from mergekit_ot.plugin_manager import PluginManager
from mergekit_ot.recipe import FusionRecipe
from mergekit_ot.sources import ReadSource, check_target, example_inputs_of, read_sources
from mergekit_ot.specs import Architecture, resolve_architecture
from mergekit_ot.workflow.report.writing import write_report

Notify = Callable[[str], None]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class FusionOutcome:
    """A fusion and where it went; `output` is None for a dry run."""

    output: str | None
    solver: str
    result: FusionResult

    def as_json(self) -> dict[str, Any]:
        """Returns the object of ``mergeot fuse --json``."""
        return {
            "output": self.output,
            "solver": self.solver,
            "groups": group_rows(self.result),
            "aligned_sources_max_error": self.result.aligned_sources_max_error,
            "seconds": self.result.seconds,
        }

    @property
    def is_exact(self) -> bool:
        """Whether every source was only reordered, so that its aligned copy computes what it computes."""
        return all(map(self.result.alignment.is_function_preserving, range(len(self.result.sources))))


def group_rows(result: FusionResult) -> list[dict[str, Any]]:
    """Returns one plain record per neuron group."""
    return [
        {"name": group.name, "size": group.size, "cost": group.cost, "status": status_word(group.status)}
        for group in result.groups
    ]


def status_word(status: object) -> str:
    """Returns a solver's status as one word."""
    return str(getattr(status, "name", status)).lower()


def run_fuse(
    recipe: FusionRecipe,
    manager: PluginManager,
    notify: Notify,
    progress: Progress | None = None,
    *,
    dry_run: bool = False,
) -> FusionOutcome:
    """Fuses checkpoints as a recipe says and saves the fused model; whatever can fail is tried before the work.

    Raises:
        MergeotError: Anything the user gave does not fit; nothing is written then.
    """
    check_methods(recipe, manager)
    output = Path(recipe.output)
    if not dry_run:
        check_output(output, recipe.models)
    if recipe.report is not None:
        check_folder(Path(recipe.report))
    sources = read_sources(recipe.models, recipe.arch, manager, notify)
    fused_as, target = _target_of(recipe, sources, manager)
    data = None if recipe.data is None else resolve_data(recipe.data, manager, TRAIN)
    inputs, shape = example_inputs_of(sources[0], recipe.input_shape, data, notify)
    result = fuse(
        [source_model(source) for source in sources],
        solver=recipe.solver,
        solver_options=recipe.solver_options,
        example_inputs=inputs,
        model_weights=recipe.weights,
        target=target,
        measure=recipe.measure,
        data=data,
        calibration_size=recipe.calibration_size,
        repair=recipe.repair,
        refine=recipe.refine,
        restarts=recipe.restarts,
        device=recipe.device,
        seed=recipe.seed,
        front_end=recipe.front_end,
        limits=limits_of(recipe),
        manager=manager,
        progress=progress,
        dry_run=dry_run,
    )
    if dry_run:
        return FusionOutcome(None, recipe.solver, result)
    save_checkpoint(
        result.state,
        output,
        architecture=fused_as.name if fused_as.is_registered else None,
        arguments=fused_as.arguments if fused_as.is_registered else None,
        input_shape=shape,
        provenance=_provenance(recipe, sources, fused_as),
        template=sources[recipe.target].checkpoint.path if isinstance(recipe.target, int) else None,
        manager=manager,
    )
    outcome = FusionOutcome(str(output), recipe.solver, result)
    if recipe.report is not None:
        _report(Path(recipe.report), recipe, outcome, sources, fused_as, manager, notify, progress)
    return outcome


def _report(
    folder: Path, recipe: FusionRecipe, outcome: FusionOutcome, sources: list[ReadSource], fused_as: Architecture,
    manager: PluginManager, notify: Notify, progress: Progress | None,
) -> None:  # fmt: skip
    try:
        write_report(folder, recipe, outcome, sources, fused_as, manager, notify, progress)
    except MergeotError as error:
        raise CheckpointError(f"'{outcome.output}' was written, but its report was not. {error}") from error


def limits_of(recipe: FusionRecipe) -> TraceLimits:
    """Returns the limits of tracing that a recipe asks for."""
    limits = TraceLimits()
    return limits if recipe.trace_seconds is None else replace(limits, seconds=recipe.trace_seconds)


def source_model(source: ReadSource) -> SourceModel:
    """Returns what the engine takes for a source that was read."""
    return SourceModel(name=source.name, make=source.make, state=source.state)


def check_methods(recipe: FusionRecipe, manager: PluginManager) -> None:
    """Checks the methods that a recipe names, before any file is read.

    Raises:
        MergeotError: A solver, measure or repair is not registered, or there is no such device.
    """
    choose_device(recipe.device)
    manager.get("solver", recipe.solver)
    if recipe.refine:
        manager.get("solver", REFINEMENT)
    if recipe.measure is not None:
        manager.get("measure", recipe.measure)
    if recipe.repair != "none":
        manager.get("repair", recipe.repair)


def check_output(output: Path, inputs: Sequence[str]) -> None:
    """Checks that a result can be written, and that it would not replace an input.

    Raises:
        CheckpointError: The place does not exist, is not writable, or is an input.
    """
    check_writable(output)
    for name in inputs:
        source = Path(name)
        if source.resolve() == output.resolve() or (source.exists() and output.exists() and source.samefile(output)):
            raise CheckpointError(f"The output '{output}' is the input '{name}': it would be lost. Choose another -o.")


def check_folder(folder: Path) -> None:
    """Checks that `folder` exists or can be made in an existing one.

    Raises:
        CheckpointError: It is a file, or its parent does not exist.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"'{folder}' is a file; a folder is needed there. Choose another name.")
    if not folder.exists():
        check_writable(folder)


def _target_of(
    recipe: FusionRecipe, sources: list[ReadSource], manager: PluginManager
) -> tuple[Architecture, int | SourceModel]:
    if isinstance(recipe.target, int):
        return sources[recipe.target].make, recipe.target
    make = resolve_architecture(recipe.target, manager)
    check_target(make, recipe.target)
    return make, SourceModel(name=f"target {recipe.target}", make=make, state={})


def _provenance(recipe: FusionRecipe, sources: list[ReadSource], fused_as: Architecture) -> dict[str, Any]:
    from mergekit_ot import __version__

    return {
        "made_by": f"mergekit_ot {__version__}",
        "solver": recipe.solver,
        "solver_options": dict(recipe.solver_options),
        "measure": recipe.measure,
        "repair": recipe.repair,
        "refine": recipe.refine,
        "restarts": recipe.restarts,
        "seed": recipe.seed,
        "target": recipe.target,
        "arch": fused_as.name,
        "sources": [
            {"name": Path(source.name).name, "sha256": source.checkpoint.sha256, "weight": weight}
            for source, weight in zip(sources, recipe.weights, strict=True)
        ],
    }
