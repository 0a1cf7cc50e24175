"""Fuse checkpoints as a recipe says: check what can fail, read, fuse, save, report."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_ot.api import fuse_with, load_checkpoint, save_checkpoint
from mergekit_ot.errors import CheckpointError, MergeotError, RecipeError
from mergekit_ot.fusion.depth.sources import place_of_depth
from mergekit_ot.fusion.extent import check_something_is_free
from mergekit_ot.fusion.options import NO_REPAIR
from mergekit_ot.fusion.result import FusionResult
from mergekit_ot.fusion.setup import FusionInputs
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.hooks.formats import check_format
from mergekit_ot.hooks.manager import PluginManager
from mergekit_ot.hooks.methods import build_solver, refining_solver
from mergekit_ot.jobs.containers import Container, container_of
from mergekit_ot.jobs.heads import with_outputs
from mergekit_ot.jobs.keeping import user_traces
from mergekit_ot.jobs.places import check_fusion_places, check_kind, input_files
from mergekit_ot.jobs.provenance import provenance_of, what_was_measured
from mergekit_ot.jobs.recipes import write_recipe
from mergekit_ot.progress import Notify, Progress
from mergekit_ot.recipe import FusionRecipe, place_in_recipe
from mergekit_ot.report.outcome import FusionOutcome
from mergekit_ot.scoring.devices import choose_device
from mergekit_ot.sources.example_inputs import example_inputs_of
from mergekit_ot.sources.guesses import check_function_is_known
from mergekit_ot.sources.needs import needs_of
from mergekit_ot.sources.reading import ReadSource, check_target, read_sources
from mergekit_ot.sources.specs import Architecture, resolve_architecture
from mergekit_ot.storage.casting import in_type, number_type
from mergekit_ot.storage.record import Checkpoint

if TYPE_CHECKING:
    from mergekit_ot.sources.datasets import DataSource


def run_fuse(
    recipe: FusionRecipe,
    manager: PluginManager,
    notify: Notify,
    progress: Progress | None = None,
    *,
    dry_run: bool = False,
    recipe_file: Path | None = None,
    save_recipe: Path | None = None,
) -> FusionOutcome:
    """Fuses checkpoints as a recipe says and saves the fused model; whatever can fail is tried before the work.

    Args:
        recipe: What is fused, how, and where it goes.
        manager: Whose methods and formats are used.
        notify: Told what was found.
        progress: Told about each step.
        dry_run: Whether to plan only; nothing is written then.
        recipe_file: The file that the recipe was read from, which no output may replace.
        save_recipe: Where the recipe is written once the model is, as a file that repeats the fusion.

    Raises:
        MergeotError: Anything the user gave does not fit; nothing is written then.
    """
    check_methods(recipe, manager, recipe_file)
    check_fusion_places(recipe, recipe_file, save_recipe, is_dry=dry_run)
    output = Path(recipe.output)
    stands = takes_neurons_as_they_stand(recipe, manager)
    sources = read_sources(recipe.models, recipe.arch, manager, notify, recipe.trust, recipe, as_they_stand=stands)
    check_guesses(recipe, sources, manager)
    recipe = _of_depth(recipe, sources)
    _check_widths(recipe, sources)
    goal = _folder_of(recipe, manager)
    container = container_of(sources, goal or recipe.target, output, recipe.format)
    if not dry_run:
        _check_container(container, recipe, recipe_file, manager)
    _check_type(recipe, sources)
    fused_as, target = _target_of(recipe, sources, manager, goal)
    data = None if recipe.data is None else _data_of(recipe, sources, manager, notify)
    inputs, shape = example_inputs_of(sources[0], recipe.input_shape, data, notify, recipe.inputs)
    result = fuse_with(
        FusionInputs([source_model(source) for source in sources], target, inputs, data),
        recipe,
        manager=manager,
        progress=progress,
        dry_run=dry_run,
        traces=user_traces(),
    )
    if dry_run:
        _check_plan(recipe, result, manager)
        if save_recipe is not None:
            notify(f"'{save_recipe}' was not written: a dry run writes nothing.")
        return FusionOutcome(None, recipe.solver, result)
    fused_as, is_registered = _widened(fused_as, recipe, result)
    # Under the names of the file whose sizes it has, so that it is read wherever that one is.
    state = container.state(result.state)
    save_checkpoint(
        state if recipe.dtype is None else in_type(state, recipe.dtype),
        output,
        architecture=fused_as.name if is_registered else None,
        arguments=fused_as.arguments if is_registered else None,
        input_shape=shape,
        provenance=provenance_of(recipe, sources, fused_as) | what_was_measured(result),
        template=container.template,
        overwrite=recipe.overwrite,
        manager=manager,
    )
    container.tell(notify)
    outcome = FusionOutcome(str(output), recipe.solver, result)
    if save_recipe is not None:
        write_recipe(save_recipe, recipe, notify)
    _report(recipe, outcome, sources, fused_as, manager, notify, progress)
    return outcome


def _check_container(
    container: Container, recipe: FusionRecipe, recipe_file: Path | None, manager: PluginManager
) -> None:
    """Checks that the fused model can be written as what it is, once the sources are read."""
    inputs = input_files(recipe, recipe_file)
    check_kind(recipe.output, inputs, container.template, overwrite=recipe.overwrite)
    check_format(manager, container.output, container.template)
    container.check(inputs, overwrite=recipe.overwrite)


def _report(
    recipe: FusionRecipe,
    outcome: FusionOutcome,
    sources: list[ReadSource],
    fused_as: Architecture,
    manager: PluginManager,
    notify: Notify,
    progress: Progress | None,
) -> None:
    """Writes the report that a recipe asks for, if it does."""
    if recipe.report is None:
        return
    with _telling_of(outcome, notify):
        # Most fusions have no report, and what writes one takes time to import.
        from mergekit_ot.report.writing import write_report

        write_report(Path(recipe.report), recipe, outcome, sources, fused_as, manager, notify, progress)


@contextlib.contextmanager
def _telling_of(outcome: FusionOutcome, notify: Notify) -> Iterator[None]:
    """Says that a model was written where its report fails."""
    try:
        yield
    except MergeotError as error:
        raise CheckpointError(f"'{outcome.output}' was written, but its report was not. {error}") from error
    except BaseException:
        notify(f"'{outcome.output}' was written, but its report was not.")
        raise


def _data_of(recipe: FusionRecipe, sources: Sequence[ReadSource], manager: PluginManager, notify: Notify) -> DataSource:
    # Most fusions need no data, and what reads them takes time to import.
    from mergekit_ot.sources.datasets import TRAIN, resolve_data

    return resolve_data(recipe.data or "", manager, TRAIN).for_network(*needs_of(sources, recipe, notify))


def source_model(source: ReadSource) -> SourceModel:
    """Returns what the engine takes for a source that was read."""
    return SourceModel(name=source.name, make=source.known, state=source.state)


def check_methods(recipe: FusionRecipe, manager: PluginManager, recipe_file: Path | None = None) -> None:
    """Checks the methods that a recipe names, before any file is read.

    Args:
        recipe: What names them.
        manager: Whose methods are known.
        recipe_file: The file that it was read from, for messages.

    Raises:
        MergeotError: A solver, measure, repair or executor is not registered, or there is no such device.
    """
    checks: dict[str, Callable[[], object]] = {
        "device": lambda: choose_device(recipe.device),
        "solver": lambda: manager.get("solver", recipe.solver),
        "executor": lambda: manager.get("executor", recipe.executor),
        "refine": lambda: recipe.refine and refining_solver(manager),
        "measure": lambda: recipe.measure is None or manager.get("measure", recipe.measure),
        "repair": lambda: recipe.repair == NO_REPAIR or manager.get("repair", recipe.repair),
        "dtype": lambda: recipe.dtype is None or number_type(recipe.dtype),
        "solver_options": lambda: build_solver(recipe.solver, recipe.solver_options, manager),
    }
    for key, check in checks.items():
        try:
            check()
        except MergeotError as error:
            raise type(error)(f"{error}{place_in_recipe(recipe_file, key, vars(recipe)[key])}") from error


def _check_type(recipe: FusionRecipe, sources: Sequence[ReadSource]) -> None:
    programs = [each.checkpoint for each in sources if each.checkpoint.build is not None]
    # The network of a folder is built from a configuration, which may say another type.
    if recipe.dtype is not None and any(each.form is None or not each.form.is_folder for each in programs):
        raise RecipeError("A program has the types of numbers that it was made with: leave 'dtype' out.")


def takes_neurons_as_they_stand(recipe: FusionRecipe, manager: PluginManager) -> bool:
    """Whether a fusion is the mean of its models' tensors and nothing else, which needs no architecture."""
    solver = manager.get("solver", recipe.solver)
    is_more = recipe.refine or recipe.repair != NO_REPAIR or recipe.measure is not None or recipe.data is not None
    is_of_layers = bool(recipe.keep or recipe.layers) or recipe.head != "one" or recipe.widen > 1
    return solver.max_sweeps == 0 and not (is_more or is_of_layers) and isinstance(recipe.target, int)


def check_guesses(recipe: FusionRecipe, sources: Sequence[ReadSource], manager: PluginManager) -> None:
    """Checks that nothing which was asked for runs networks whose function was only guessed.

    Raises:
        ArchitectureError: Something does.
    """
    measure = recipe.measure or manager.get("solver", recipe.solver).measure
    running = {
        f"--repair {recipe.repair}": recipe.repair != NO_REPAIR,
        f"The measure '{measure}'": manager.get("measure", measure).needs_data,
        "--data": recipe.data is not None,
    }
    for doing, is_asked in running.items():
        if is_asked:
            check_function_is_known([(source.name, source.make) for source in sources], doing)


def _check_plan(recipe: FusionRecipe, result: FusionResult, manager: PluginManager) -> None:
    """Checks that a planned fusion has something to align, as the fusion itself would."""
    if manager.get("solver", recipe.solver).max_sweeps > 0 and len(result.sources) > 1:
        keys = [key for step in result.plan.steps for key in step.groups]
        check_something_is_free(result.alignment.target, keys, result.target.name)


def _folder_of(recipe: FusionRecipe, manager: PluginManager) -> Checkpoint | None:
    """Returns the folder whose form and sizes the fused model takes, where the target is named by one."""
    if isinstance(recipe.target, str) and Path(recipe.target).is_dir():
        return load_checkpoint(recipe.target, manager)
    return None


def _target_of(
    recipe: FusionRecipe, sources: list[ReadSource], manager: PluginManager, goal: Checkpoint | None
) -> tuple[Architecture, int | SourceModel]:
    if isinstance(recipe.target, int):
        return sources[recipe.target].make, recipe.target
    if goal is not None and goal.build is not None:
        make = Architecture(goal.architecture or recipe.target, {}, goal.build)
    else:
        make = resolve_architecture(recipe.target, manager)
    check_target(make, recipe.target)
    return make, SourceModel(name=f"target {recipe.target}", make=make, state={})


def _check_widths(recipe: FusionRecipe, sources: Sequence[ReadSource]) -> None:
    """Checks that a network with layers of other widths can be written.

    Raises:
        RecipeError: A program or a configuration says the widths.
    """
    fixed = [each for each in sources if each.checkpoint.build is not None]
    if recipe.widen > 1 and fixed:
        raise RecipeError(
            f"'{fixed[0].name}' holds a program or a configuration that says its widths, so it cannot be widened "
            "(--widen). Take its weights alone: --arch SPEC, with --format state-dict."
        )


def _of_depth(recipe: FusionRecipe, sources: Sequence[ReadSource]) -> FusionRecipe:
    """Returns the recipe with the deepest source as target, where the one that is named has fewer blocks."""
    if not isinstance(recipe.target, int):
        return recipe
    target = place_of_depth([source.known.shapes for source in sources], recipe.target)
    return recipe if target == recipe.target else replace(recipe, target=target)


def _widened(fused_as: Architecture, recipe: FusionRecipe, result: FusionResult) -> tuple[Architecture, bool]:
    """Returns the architecture of the fused model, with room for the heads of all; and whether a file may name it."""
    if result.growth is not None:
        return fused_as, False  # no argument says its sizes
    if not result.head_sizes or not isinstance(recipe.target, int):
        return fused_as, fused_as.is_registered
    wider = with_outputs(fused_as, result.head_sizes[recipe.target], sum(result.head_sizes), result.state)
    return wider or fused_as, wider is not None and wider.is_registered
