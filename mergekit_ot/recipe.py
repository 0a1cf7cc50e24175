"""A fusion as data: what the flags of ``mergeot fuse`` say, as an object and as a YAML file."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from mergekit_ot.errors import RecipeError
from mergekit_ot.fusion.options import FusionOptions
from mergekit_ot.storage.files import missing_file, write_text
from mergekit_ot.storage.marks import YAML_COMMENT

_SUM_TOLERANCE = 1e-6
# What a recipe is about comes first in its file; the other keys follow in the order of their fields.
_FIRST_KEYS = ("models", "output", "solver", "solver_options", "arch", "trust", "input_shape", "measure")
_FIRST_KEYS += (
    "model_weights",
    "target",
    "data",
    "calibration_size",
    "repair",
    "refine",
    "restarts",
    "device",
    "seed",
    "report",
)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FusionRecipe(FusionOptions):
    """One fusion: sources in order, the method (`FusionOptions`), and where the result goes.

    Attributes:
        models: The source models, in order; the order is kept everywhere.
        output: Where the fused model is written.
        arch: Architecture SPECs: none (the checkpoints carry theirs), one for all, or one per model.
        trust: Those of the models whose programs may be loaded, which can run code of whoever made the file.
        input_shape: Shape of one input without the batch axis.
        target: Whose sizes the fused model takes: the place of a source (from 0), or an architecture SPEC.
        data: Data SPEC for calibration.
        report: Folder for a report.
        overwrite: Whether files that mergeot did not write may be replaced.
    """

    models: tuple[str, ...] = ()
    output: str = "fused.pt"
    arch: tuple[str, ...] = ()
    trust: tuple[str, ...] = ()
    input_shape: tuple[int, ...] | None = None
    target: int | str = 0
    data: str | None = None
    report: str | None = None
    overwrite: bool = False

    @property
    def weights(self) -> tuple[float, ...]:
        """The model weights, equal ones where none are given."""
        return self.model_weights or tuple(1 / len(self.models) for _ in self.models)

    def to_yaml(self) -> str:
        """Returns the recipe as YAML that `read_recipe` reads back."""
        given = TypeAdapter(FusionRecipe).dump_python(self, mode="json", exclude_defaults=True)
        return yaml.safe_dump({key: given[key] for key in recipe_keys() if key in given}, sort_keys=False)

    def write(self, path: Path) -> None:
        """Writes the recipe as a YAML file; one that mergeot did not write is replaced where it says ``overwrite``.

        Raises:
            CheckpointError: The file may not be written.
        """
        write_text(path, self.to_yaml(), comment=YAML_COMMENT, overwrite=self.overwrite)


def recipe_keys() -> list[str]:
    """Returns the keys of a recipe, in the order in which they are written.

    Example:
        >>> recipe_keys()[:3]
        ['models', 'output', 'solver']
    """
    names = [field.name for field in dataclasses.fields(FusionRecipe)]
    return [*_FIRST_KEYS, *(name for name in names if name not in _FIRST_KEYS)]


def make_recipe(file: str | Path | None = None, **flags: Any) -> FusionRecipe:
    """Builds a recipe from a YAML file, from flags, or from both: a flag that is given overrides the file.

    Args:
        file: The YAML file; its keys are the fields of `FusionRecipe`.
        **flags: Fields; None and empty values count as not given (0 is a value).

    Raises:
        RecipeError: A key is unknown, a value has the wrong type, or the model weights do not fit.

    Example:
        >>> make_recipe(models=["a.pt", "b.pt"], model_weights=[0.0, 1.0]).weights
        (0.0, 1.0)
    """
    content = {} if file is None else _read(Path(file))
    for key, value in flags.items():
        if value is not None and value != () and value != [] and value != {}:
            content[key] = {**content.get(key, {}), **value} if key == "solver_options" else value
    try:
        recipe = FusionRecipe(**content)
    except ValidationError as error:
        raise RecipeError(_first_problem(error)) from error
    check_models(recipe)
    return recipe


def check_models(recipe: FusionRecipe) -> None:
    """Checks what several fields say together: models, weights, target.

    Raises:
        RecipeError: Says which field does not fit, and how to correct it.
    """
    count = len(recipe.models)
    if count < 2 and (count < 1 or isinstance(recipe.target, int)):
        raise RecipeError(
            f"A fusion needs at least two models; {count} given. Name the checkpoints: mergeot fuse A B. "
            "(One model is fused into other sizes with --target SPEC.)"
        )
    check_model_weights(recipe.weights, count)
    if isinstance(recipe.target, int) and not 0 <= recipe.target < count:
        raise RecipeError(
            f"target {recipe.target} does not exist: with {count} models it is 0 to {count - 1}, or an architecture "
            "SPEC."
        )
    if len(recipe.arch) not in (0, 1, count):
        raise RecipeError(
            f"{len(recipe.arch)} architectures for {count} models: give --arch once for all, or once each."
        )


def check_model_weights(weights: tuple[float, ...], count: int) -> None:
    """Checks that there is one weight per model, none negative, summing to one.

    Raises:
        RecipeError: Says which condition fails.
    """
    shown = ", ".join(f"{weight:g}" for weight in weights)
    if len(weights) != count:
        raise RecipeError(f"{len(weights)} model weights ({shown}) for {count} models: give one per model, in order.")
    if any(not math.isfinite(weight) or weight < 0 for weight in weights):
        raise RecipeError(f"Model weights {shown}: each must be a number of at least zero (zero leaves a model out).")
    total = math.fsum(weights)
    if abs(total - 1) > _SUM_TOLERANCE:
        scaled = f" Scaled to one: {','.join(f'{weight / total:.6g}' for weight in weights)}." if total > 0 else ""
        raise RecipeError(f"Model weights {shown} sum to {total:g}, not to one.{scaled}")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(missing_file(path))
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"'{path}' is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, Mapping):
        raise RecipeError(f"'{path}' is not a recipe: expected keys and values, such as 'solver: wb'.")
    known = {key.replace("-", "_"): value for key, value in content.items() if isinstance(key, str)}
    for single in ("arch", "models", "trust"):
        if isinstance(known.get(single), str):
            known[single] = [known[single]]
    return known


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    key = str(problem["loc"][0]) if problem["loc"] else "recipe"
    names = recipe_keys()
    if problem["type"] == "unexpected_keyword_argument":
        close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
        guess = f" Did you mean '{close[0]}'?" if close else ""
        return f"Unknown recipe key '{key}'.{guess} Valid keys: {', '.join(names)}."
    return f"Recipe key '{key}' is {problem.get('input')!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}."
