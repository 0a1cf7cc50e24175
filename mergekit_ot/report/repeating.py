"""The commands that repeat a fusion."""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from mergekit_ot.fusion.options import option_fields
from mergekit_ot.recipe import FusionRecipe
from mergekit_ot.sources.specs import parse_value
from mergekit_ot.storage.file_options import AS_SOURCE

RECIPE_FILE = "recipe.yaml"
_PLUGINS = "MERGEOT_PLUGINS"
_QUOTED = str.maketrans({"\\": "\\\\", "'": "\\'"})


def fuse_command(recipe: FusionRecipe, device: str) -> str | None:
    """Returns the command line of a fusion, quoted for a shell; None where no flags say what the recipe says.

    Args:
        recipe: The fusion.
        device: The device that it ran on: what ``auto`` was.
    """
    options = (*recipe.solver_options.values(), *recipe.repair_options.values())
    # Rules for single layers stand in recipes only.
    if recipe.layers or not all(map(_is_said_by_flags, options)):
        return None
    options = {field.name: getattr(recipe, field.name) for field in option_fields("fuse")}
    options["device"] = device
    flags = _flags_of_places(recipe)
    for name, value in options.items():
        flags += _flags_of(name, value)
    flags += [] if recipe.report is None else ["--report", recipe.report]
    flags += ["--overwrite"] if recipe.overwrite else []
    models = list(recipe.models)
    # A name that looks like a flag has to stand behind everything that is one.
    ordered = [*flags, "--", *models] if any(name.startswith("-") for name in models) else [*models, *flags]
    return _shown(["mergeot", "fuse", *ordered])


def _flags_of_places(recipe: FusionRecipe) -> list[str]:
    """Returns the flags of what a fusion reads and writes, but for the models and the report."""
    flags = ["--output", recipe.output]
    for spec in recipe.arch:
        flags += ["--arch", spec]
    for name in recipe.trust:
        flags += ["--trust", name]
    if recipe.input_shape is not None:
        flags += ["--input-shape", ",".join(map(str, recipe.input_shape))]
    for described in recipe.inputs:
        flags += ["--input", described]
    flags += ["--target", str(recipe.target)]
    for name in ("state_key", "strip_prefix", "input_key", "label_key"):
        flags += _flags_of(name, getattr(recipe, name))
    for pattern in recipe.ignore:
        flags += ["--ignore", pattern]
    flags += [] if recipe.format == AS_SOURCE else ["--format", recipe.format]
    return flags if recipe.data is None else [*flags, "--data", recipe.data]


def _flags_of(name: str, value: object) -> list[str]:
    """Returns what says the value of an option on the command line; nothing where it is off."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, Mapping):
        said = [(flag.removesuffix("s"), f"{key}={_written(each)}") for key, each in value.items()]
        return list(itertools.chain(*said))
    if isinstance(value, bool):
        return [flag] if value else []
    if isinstance(value, tuple) and all(isinstance(each, str) for each in value):
        return list(itertools.chain(*[(flag, each) for each in value]))
    if isinstance(value, tuple):
        return [flag, ",".join(map(repr, value))]
    return [] if value is None else [flag, str(value)]


def recipe_command(folder: Path) -> str:
    """Returns the command that repeats a fusion from the recipe in a report's folder."""
    return _shown(["mergeot", "fuse", "--recipe", str(folder / RECIPE_FILE)])


def _shown(command: list[str]) -> str:
    chosen = os.environ.get(_PLUGINS)
    before = "" if chosen is None else f"{_PLUGINS}={_quoted(chosen)} "
    return before + " ".join(map(_quoted, command))


def _quoted(word: str) -> str:
    """Returns a word for a shell; what is not printed is written as bytes, which the shells of today read."""
    if word.isprintable():
        return shlex.quote(word)
    letters = [letter.translate(_QUOTED) if letter.isprintable() else _as_bytes(letter) for letter in word]
    return f"$'{''.join(letters)}'"


def _as_bytes(letter: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in letter.encode("utf-8", "surrogateescape"))


def _written(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_written, value))
    if isinstance(value, str):
        return value
    return str(value).lower() if isinstance(value, bool | None) else repr(value)


def _is_said_by_flags(value: object) -> bool:
    """Whether the value of a solver's option is read back from the command line as it is."""
    read_back = parse_value(_written(value))
    return type(read_back) is type(value) and read_back == value
