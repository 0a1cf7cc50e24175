"""Fuse checkpoints as a recipe says: check what can fail, read, fuse, save, report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergekit_ot.api import fuse_with, save_checkpoint
from mergekit_ot.errors import CheckpointError, MergeotError
from mergekit_ot.fusion.options import NO_REPAIR
from mergekit_ot.fusion.setup import FusionInputs
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.hooks.manager import PluginManager
from mergekit_ot.hooks.methods import refining_solver
from mergekit_ot.progress import Notify, Progress
from mergekit_ot.recipe import FusionRecipe
from mergekit_ot.report.outcome import FusionOutcome
from mergekit_ot.report.writing import write_report
from mergekit_ot.scoring.evaluation import choose_device
from mergekit_ot.sources.datasets import TRAIN, resolve_data
from mergekit_ot.sources.example_inputs import example_inputs_of
from mergekit_ot.sources.reading import ReadSource, check_target, read_sources
from mergekit_ot.sources.specs import Architecture, resolve_architecture
from mergekit_ot.storage.files import check_writable


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
    result = fuse_with(
        FusionInputs([source_model(source) for source in sources], target, inputs, data),
        recipe,
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
        try:
            write_report(Path(recipe.report), recipe, outcome, sources, fused_as, manager, notify, progress)
        except MergeotError as error:
            raise CheckpointError(f"'{outcome.output}' was written, but its report was not. {error}") from error
    return outcome


def source_model(source: ReadSource) -> SourceModel:
    """Returns what the engine takes for a source that was read."""
    return SourceModel(name=source.name, make=source.make, state=source.state)


def check_methods(recipe: FusionRecipe, manager: PluginManager) -> None:
    """Checks the methods that a recipe names, before any file is read.

    Raises:
        MergeotError: A solver, measure, repair or executor is not registered, or there is no such device.
    """
    choose_device(recipe.device)
    manager.get("solver", recipe.solver)
    manager.get("executor", recipe.executor)
    if recipe.refine:
        refining_solver(manager)
    if recipe.measure is not None:
        manager.get("measure", recipe.measure)
    if recipe.repair != NO_REPAIR:
        manager.get("repair", recipe.repair)


def check_output(output: Path, inputs: Sequence[str]) -> None:
    """Checks that a result can be written, and that it would not replace an input.

    Raises:
        CheckpointError: The place does not exist, is not writable, or is an input.
    """
    check_writable(output)
    for name in inputs:
        is_same_path = os.path.realpath(name) == os.path.realpath(output)
        if is_same_path or (os.path.exists(name) and os.path.exists(output) and os.path.samefile(name, output)):
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
