"""A fusion that was asked for by flags, written as a recipe that repeats it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mergekit_ot.progress import Notify
from mergekit_ot.recipe import FusionRecipe
from mergekit_ot.storage.files import write_text
from mergekit_ot.storage.marks import YAML_COMMENT


def write_recipe(path: Path, recipe: FusionRecipe, notify: Notify) -> None:
    """Writes a recipe as a YAML file without absolute paths.

    Args:
        path: Where to.
        recipe: The fusion.
        notify: Told where the file has to be completed by hand.

    Raises:
        CheckpointError: It cannot be written.
    """
    # Few fusions save their recipe, and what knows which names are portable takes time to import.
    from mergekit_ot.report.facts import portable_recipe

    shared = replace(portable_recipe(recipe), overwrite=False)
    write_text(path, shared.to_yaml(), comment=YAML_COMMENT, overwrite=recipe.overwrite)
    if shared != replace(recipe, overwrite=False):
        notify(
            f"'{path}' names no absolute path: files of the working folder stand in it relative to that, and others "
            "without their folder. Repeat it from the folder where they are."
        )
