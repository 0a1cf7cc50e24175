"""Write models in the neuron order of another: the same functions, ready for any other merging tool."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_ot.api import fuse_with, save_checkpoint
from mergekit_ot.errors import ArchitectureError
from mergekit_ot.fusion.depth.sources import deepest
from mergekit_ot.fusion.extent import Extent
from mergekit_ot.fusion.options import NO_REPAIR
from mergekit_ot.fusion.result import FusionResult
from mergekit_ot.fusion.setup import FusionInputs
from mergekit_ot.hooks.formats import check_format
from mergekit_ot.hooks.manager import PluginManager
from mergekit_ot.jobs.containers import container_of
from mergekit_ot.jobs.fusing import check_guesses, check_methods, source_model
from mergekit_ot.jobs.keeping import user_traces
from mergekit_ot.jobs.places import input_files
from mergekit_ot.progress import Notify, Progress
from mergekit_ot.recipe import FusionRecipe
from mergekit_ot.report.outcome import extent_facts
from mergekit_ot.sources.datasets import TRAIN, DataSource, resolve_data
from mergekit_ot.sources.example_inputs import example_inputs_of
from mergekit_ot.sources.needs import needs_of
from mergekit_ot.sources.reading import ReadSource, read_sources
from mergekit_ot.storage.files import made_folder
from mergekit_ot.storage.folders import check_folder_output
from mergekit_ot.storage.outputs import check_folder, check_output


@dataclass(frozen=True)
class AlignedFile:
    """One model written in the reference's neuron order.

    Attributes:
        source: The file that it was read from.
        path: The file that was written.
        max_error: Largest relative difference between what both compute.
        seconds: Wall time of the alignment.
        extent: How much was aligned.
        sentence: What comparing the two showed.
    """

    source: str
    path: str
    max_error: float | None
    seconds: float
    extent: Extent
    sentence: str

    def as_json(self) -> dict[str, Any]:
        """Returns the object of ``mergeot align --json`` for it."""
        return {
            "source": self.source,
            "path": self.path,
            "max_error": self.max_error,
            "seconds": self.seconds,
            **extent_facts(self.extent),
        }


def run_align(
    recipe: FusionRecipe, folder: Path, manager: PluginManager, notify: Notify, progress: Progress | None = None
) -> list[AlignedFile]:
    """Writes models in the neuron order of the first; every one computes what it computed before.

    Args:
        recipe: Its first model is the reference, the others are reordered; solver, architectures and data.
        folder: Where they are written, under their own names.
        manager: Whose solvers are used.
        notify: Told what was found.
        progress: Told about each step.

    Raises:
        MergeotError: Anything the user gave does not fit, or the solver gives no reordering.
    """
    reference, others = recipe.models[0], recipe.models[1:]
    check_methods(recipe, manager)
    check_folder(folder)
    outputs = _output_names(folder, others)
    for output, other in zip(outputs, others, strict=True):
        if folder.is_dir():
            check = check_folder_output if os.path.isdir(other) else check_output
            check(output, input_files(recipe), overwrite=recipe.overwrite)
    sources = read_sources(recipe.models, recipe.arch, manager, notify, recipe.trust, recipe)
    check_guesses(recipe, sources, manager)
    containers = [container_of(sources, place, output, recipe.format) for place, output in enumerate(outputs, start=1)]
    for container in containers:
        check_format(manager, container.output, container.template)
        if folder.is_dir():
            container.check(input_files(recipe), overwrite=recipe.overwrite)
    data = None
    if recipe.data is not None:
        data = resolve_data(recipe.data, manager, TRAIN).for_network(*needs_of(sources, recipe, notify))
    inputs, shape = example_inputs_of(sources[0], recipe.input_shape, data, notify, recipe.inputs)
    written = []
    for source, container in zip(sources[1:], containers, strict=True):
        output = container.output
        # A file is to hold the reference's own form: what only a normal form allows is left out.
        result = align_pair(sources[0], source, recipe, inputs, data, manager, progress, may_rewrite=False)
        check_reference_order(sources[0], result, recipe.solver)
        for warning in result.warnings:
            # A model that is only reordered needs no repair.
            if "--repair" not in warning:
                notify(f"warning: {warning}")
        # Of the file as it is: the fusion may have read it in the reference's number types.
        aligned = result.checked_state(1, source_model(source))
        make, digest = source.make, source.checkpoint.sha256
        with made_folder(folder):
            save_checkpoint(
                container.state(aligned),
                output,
                architecture=make.name if make.is_registered else None,
                arguments=make.arguments if make.is_registered else None,
                input_shape=shape,
                provenance={"aligned_to": Path(reference).name, "solver": recipe.solver, "sha256": digest},
                template=container.template,
                overwrite=recipe.overwrite,
                manager=manager,
            )
        container.tell(notify)
        sentence = "" if result.check is None else result.check.sentence
        written.append(
            AlignedFile(
                source.name,
                str(output),
                result.aligned_sources_max_error,
                result.seconds,
                result.extent,
                sentence,
            )
        )
    return written


def _output_names(folder: Path, others: Sequence[str]) -> list[Path]:
    names: list[Path] = []
    for other in others:
        # Of a folder such as "." too.
        path, count = folder / Path(os.path.abspath(other)).name, 2
        while path in names:
            path, count = folder / f"{Path(other).stem}-{count}{Path(other).suffix}", count + 1
        names.append(path)
    return names


def align_pair(
    reference: ReadSource,
    other: ReadSource,
    recipe: FusionRecipe,
    inputs: tuple[Tensor, ...],
    data: DataSource | None,
    manager: PluginManager,
    progress: Progress | None = None,
    dry_run: bool = False,
    *,
    may_rewrite: bool = True,
) -> FusionResult:
    """Returns the fusion of two models in which every neuron of one corresponds to one of the other.

    Args:
        reference: The model whose neurons stay.
        other: The one that is aligned to it.
        recipe: The solver, and all that goes with it.
        inputs: To trace them with.
        data: Calibration data, or none.
        manager: Whose solvers are used.
        progress: Told about each step.
        dry_run: Whether to stop before anything is solved.
        may_rewrite: Whether both may be aligned in their normal forms.

    Raises:
        ArchitectureError: Neurons have no one-to-one correspondence: widths differ, or the plan is soft.
    """
    for name in reference.state.names:
        shape = reference.state.shape(name)
        if name in other.state and other.state.shape(name) != shape:
            raise ArchitectureError(
                f"'{other.name}' and '{reference.name}' differ in width ('{name}' is {tuple(other.state.shape(name))} "
                f"and {tuple(shape)}): neurons cannot be put in one order. Fuse them instead (mergeot fuse)."
            )
    if deepest([reference.known.shapes, other.known.shapes]) is not None:
        raise ArchitectureError(
            f"'{other.name}' and '{reference.name}' differ in depth: a file that is put in another's order keeps its "
            "own blocks. Fuse them instead (mergeot fuse), which adds blocks that compute nothing."
        )
    models = [source_model(reference), source_model(other)]
    # The recipe may hold more than two models, and nothing is averaged or mended here.
    options = replace(recipe, model_weights=None, repair=NO_REPAIR)
    result = fuse_with(
        FusionInputs(models, example_inputs=inputs, data=data, may_rewrite=may_rewrite, is_compared=False),
        options,
        manager=manager,
        progress=progress,
        dry_run=dry_run,
        traces=user_traces(),
    )
    if not all(result.alignment.is_function_preserving(number) for number in (0, 1)):
        raise ArchitectureError(
            f"Solver '{recipe.solver}' gave a soft transport plan, which is no order of neurons. "
            "Choose one that assigns neurons, such as weight-matching."
        )
    return result


def check_reference_order(reference: ReadSource, result: FusionResult, solver: str) -> None:
    """Checks that the fused order is the reference's own.

    Raises:
        ArchitectureError: The solver reordered the reference.
    """
    kept = result.aligned_state(0)
    for name, tensor in result.models.rewritten(reference.state, 0).items():
        if not _same(kept[name], tensor):
            raise ArchitectureError(
                f"Solver '{solver}' reordered the reference itself ('{name}'), so there is no common order to write. "
                "Choose another, such as --solver weight-matching."
            )


def _same(kept: Tensor, tensor: Tensor) -> bool:
    return bool((kept.to(tensor).reshape(-1) == tensor.reshape(-1)).all())
