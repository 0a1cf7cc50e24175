"""The commands that repeat a fusion."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from mergekit_ot.recipe import FusionRecipe
from mergekit_ot.sources.specs import parse_value

RECIPE_FILE = "recipe.yaml"
_PLUGINS = "MERGEOT_PLUGINS"


def fuse_command(recipe: FusionRecipe, device: str) -> str | None:
    """Returns the command line of a fusion, quoted for a shell; None where no flags say what the recipe says.

    Args:
        recipe: The fusion.
        device: The device that it ran on: what ``auto`` was.
    """
    options = {key: _written(value) for key, value in recipe.solver_options.items()}
    if any(not _is_same(parse_value(options[key]), value) for key, value in recipe.solver_options.items()):
        return None
    flags = ["--output", recipe.output, "--solver", recipe.solver]
    for key, value in options.items():
        flags += ["--solver-option", f"{key}={value}"]
    for spec in recipe.arch:
        flags += ["--arch", spec]
    shape, weights = recipe.input_shape, recipe.model_weights
    settings = {
        "--input-shape": None if shape is None else ",".join(map(str, shape)),
        "--measure": recipe.measure,
        "--model-weights": None if weights is None else ",".join(map(repr, weights)),
        "--target": recipe.target,
        "--data": recipe.data,
        "--calibration-size": recipe.calibration_size if recipe.data is not None else None,
        "--repair": recipe.repair,
        "--restarts": recipe.restarts,
        "--device": device,
        "--seed": recipe.seed,
        "--front-end": recipe.front_end,
        "--trace-seconds": recipe.trace_seconds,
        "--report": recipe.report,
    }
    for flag, value in settings.items():
        flags += [] if value is None else [flag, str(value)]
    flags += ["--refine"] if recipe.refine else []
    models = list(recipe.models)
    # A name that looks like a flag has to stand behind everything that is one.
    ordered = [*flags, "--", *models] if any(name.startswith("-") for name in models) else [*models, *flags]
    return _shown(["mergeot", "fuse", *ordered])


def recipe_command(folder: Path) -> str:
    """Returns the command that repeats a fusion from the recipe in a report's folder."""
    return _shown(["mergeot", "fuse", "--recipe", str(folder / RECIPE_FILE)])


def _shown(command: list[str]) -> str:
    chosen = os.environ.get(_PLUGINS)
    before = "" if chosen is None else f"{_PLUGINS}={shlex.quote(chosen)} "
    return before + shlex.join(command)


def _written(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_written, value))
    return value if isinstance(value, str) else str(value).lower() if isinstance(value, bool | None) else repr(value)


def _is_same(one: object, other: object) -> bool:
    return type(one) is type(other) and one == other
