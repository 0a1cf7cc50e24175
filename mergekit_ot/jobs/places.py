"""What a job reads and where it writes, checked before any file is read: nothing that is read may be lost."""

from __future__ import annotations

import itertools
from pathlib import Path

from mergekit_ot.errors import CheckpointError, RecipeError
from mergekit_ot.recipe import FusionRecipe
from mergekit_ot.sources.spec_files import spec_files
from mergekit_ot.storage.folders import check_folder_output
from mergekit_ot.storage.forms import goes_into_folder, names_folder
from mergekit_ot.storage.outputs import check_folder, check_output, check_outputs, is_same
from mergekit_ot.storage.record import Checkpoint


def input_files(recipe: FusionRecipe, recipe_file: Path | None = None) -> list[str | Path]:
    """Returns the files that a job reads: models, what its SPECs name, and the recipe itself."""
    specs = [*recipe.arch, *(spec for spec in (recipe.target, recipe.data) if isinstance(spec, str))]
    read = [*recipe.models, *itertools.chain.from_iterable(map(spec_files, specs))]
    return read if recipe_file is None else [*read, recipe_file]


def check_fusion_places(
    recipe: FusionRecipe, recipe_file: Path | None = None, save_recipe: Path | None = None, *, is_dry: bool = False
) -> None:
    """Checks where a fusion, its report and its recipe are written.

    Args:
        recipe: The fusion.
        recipe_file: The file that it was read from.
        save_recipe: Where its recipe is saved.
        is_dry: Whether nothing is written, so that only the folder of the report is looked at.

    Raises:
        MergeotError: A file or the folder cannot be written, or one would be lost.
    """
    inputs = input_files(recipe, recipe_file)
    if not is_dry:
        check_fused_place(recipe.output, inputs, recipe)
    if save_recipe is not None and not is_dry:
        check_recipe_place(save_recipe, recipe, recipe_file)
    if recipe.report is not None:
        _check_report(recipe, Path(recipe.report), inputs, recipe_file, is_dry=is_dry)


def check_fused_place(place: str, inputs: list[str | Path], recipe: FusionRecipe) -> None:
    """Checks where a fused model is written, before the sources are read: a file, or a folder like the sources.

    Raises:
        CheckpointError: It cannot be written, or something would be lost.
    """
    if names_folder(place) and any(map(_may_be_folder, recipe.models)):
        check_folder_output(Path(place), inputs, overwrite=recipe.overwrite)
    else:
        check_file_name(place)
        check_output(Path(place), inputs, overwrite=recipe.overwrite)


def check_kind(place: str, inputs: list[str | Path], template: Checkpoint | None, *, overwrite: bool) -> None:
    """Checks that a fused model goes into what its place is called, once the sources are read.

    Raises:
        CheckpointError: It is a file and the place is a folder, or it is a folder and cannot be written.
    """
    form = None if template is None else template.form
    if goes_into_folder(Path(place), form):
        check_folder_output(Path(place), inputs, overwrite=overwrite)
    else:
        check_file_name(place)
        check_output(Path(place), inputs, overwrite=overwrite)


def _may_be_folder(model: str) -> bool:
    return not Path(model).is_file()


def _check_report(
    recipe: FusionRecipe, folder: Path, inputs: list[str | Path], recipe_file: Path | None, *, is_dry: bool
) -> None:
    # Most fusions have no report, and what writes one takes time to import.
    from mergekit_ot.report.repeating import RECIPE_FILE
    from mergekit_ot.report.writing import report_files

    check_folder(folder)
    if is_dry:
        return
    output = Path(recipe.output)
    if is_same(folder, output):
        raise RecipeError(f"The output and the report are both '{folder}': give each a place of its own.")
    files = report_files(folder)
    if recipe_file is not None and is_same(folder / RECIPE_FILE, recipe_file):
        _check_same_recipe(recipe, recipe_file)
        files.pop(RECIPE_FILE)
    if folder.is_dir():
        # A folder as the output was checked by itself.
        outputs = files if names_folder(recipe.output) else {"The output": output, **files}
        check_outputs(outputs, inputs, overwrite=recipe.overwrite)


def check_recipe_place(path: Path, recipe: FusionRecipe, recipe_file: Path | None = None) -> None:
    """Checks where a recipe is saved.

    Args:
        path: The file.
        recipe: The fusion, whose output is another file.
        recipe_file: The file that it was read from, which stays.

    Raises:
        MergeotError: It cannot be written, or something would be lost.
    """
    if is_same(path, Path(recipe.output)):
        raise RecipeError(f"The output and --save-recipe are both '{path}': give each a file of its own.")
    check_output(path, input_files(recipe, recipe_file), overwrite=recipe.overwrite)


def check_file_name(name: str) -> None:
    """Checks that a name does not say that it is a folder.

    Raises:
        CheckpointError: It ends like one.
    """
    if name.endswith(("/", "\\")):
        raise CheckpointError(f"The output '{name}' names a folder. Give the name of a file, such as {name}fused.pt.")


def _check_same_recipe(recipe: FusionRecipe, recipe_file: Path) -> None:
    """A report may be made anew from its own recipe, which then stays as it is."""
    from mergekit_ot.report.facts import portable_recipe
    from mergekit_ot.report.writing import report_recipe

    if recipe_file.read_text(encoding="utf-8") != report_recipe(portable_recipe(recipe)):
        raise CheckpointError(
            f"The report would replace the recipe '{recipe_file}' that it is made from, by another one: it would be "
            "lost. Choose another --report."
        )
