"""A fusion as data: what the flags of ``mergeot fuse`` say, as an object and as a YAML file."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from annotated_types import Ge, MinLen
from pydantic import ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from mergekit_ot.errors import RecipeError
from mergekit_ot.fusion.options import FusionOptions
from mergekit_ot.fusion.shares import checked_weights
from mergekit_ot.progress import Notify
from mergekit_ot.recipe_files.mergekit import is_mergekit, translated
from mergekit_ot.scoring.data_options import DataOptions
from mergekit_ot.storage.file_options import FORMATS, FileOptions, WritingOptions
from mergekit_ot.storage.files import write_text
from mergekit_ot.storage.limits import shortened
from mergekit_ot.storage.marks import YAML_COMMENT
from mergekit_ot.storage.yaml_files import YamlFile, read_yaml

_SEEDS = 2**63
# A result that is given no name has the ending of its source where that says the container.
_KEPT_SUFFIXES = (".safetensors", ".npz")
_FOLDER = "fused"
# Keys that are checked together, the more telling first: a message about one names it.
_TOGETHER = ("model_weights", "target", "arch", "models")
_TYPES = {"bool_type", "int_type", "float_type"}
# Flags add to what the file says under these.
_OPTIONS = ("solver_options", "repair_options")
# What a recipe is about comes first in its file; the other keys follow in the order of their fields.
_FIRST_KEYS = ("models", "output", "solver", "solver_options", "arch", "trust", "input_shape", "inputs", "measure")
_FIRST_KEYS += (
    "model_weights",
    "target",
    "data",
    "input_key",
    "label_key",
    "calibration_size",
    "calibration_tokens",
    "repair",
    "repair_options",
    "refine",
    "restarts",
    "device",
    "seed",
    "report",
)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class FusionRecipe(FusionOptions, DataOptions, FileOptions, WritingOptions):
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
    input_shape: Annotated[tuple[Annotated[int, Ge(1)], ...], MinLen(1)] | None = None
    target: int | str = 0
    data: str | None = None
    report: str | None = None
    overwrite: bool = False

    @model_validator(mode="before")
    @classmethod
    def _with_tuples(cls, given: ArgsKwargs) -> ArgsKwargs:
        """Takes lists for tuples; everything else has to be of its type."""
        named = {key: tuple(value) if isinstance(value, list) else value for key, value in (given.kwargs or {}).items()}
        if isinstance(named.get("keep"), str):
            named["keep"] = (named["keep"],)
        return ArgsKwargs(given.args, named)

    @property
    def weights(self) -> tuple[float, ...]:
        """The model weights, divided by their sum; equal ones where none are given."""
        return checked_weights(self.model_weights, len(self.models))

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


def make_recipe(file: str | Path | None = None, notify: Notify | None = None, **flags: Any) -> FusionRecipe:
    """Builds a recipe from a YAML file, from flags, or from both: a flag that is given overrides the file.

    Args:
        file: The YAML file; its keys are the fields of `FusionRecipe`, or those of mergekit.
        notify: Told what of a recipe of mergekit was left out.
        **flags: Fields; None and empty values count as not given (0 is a value).

    Raises:
        RecipeError: A key is unknown, a value has the wrong type, or the model weights do not fit.

    Example:
        >>> make_recipe(models=["a.pt", "b.pt"], model_weights=[0.0, 1.0]).weights
        (0.0, 1.0)
    """
    read = _ReadRecipe({}) if file is None else _read(Path(file), notify)
    content, given = read.content, set()
    for key, value in flags.items():
        if value is not None and value != () and value != [] and value != {}:
            given.add(key)
            content[key] = {**content.get(key, {}), **value} if key in _OPTIONS else value
    if "output" not in content:
        content |= _named_as_source(content)
    try:
        # Checked strictly: a text is no number, a fraction no whole one, and a list stands for the tuple that it gives.
        recipe = FusionRecipe(**{key: _as_tuple(value) for key, value in content.items()})
    except ValidationError as error:
        way = error.errors()[0]["loc"]
        source = read.blame() if way and way[0] in given else read.blame(*way)
        raise RecipeError(_first_problem(error) + source) from error
    if recipe.trace_seconds is not None and not math.isfinite(recipe.trace_seconds):
        said = f"Recipe key 'trace_seconds' is {recipe.trace_seconds}: it is a number of seconds."
        raise RecipeError(said + read.blame("trace_seconds"))
    if not 0 <= recipe.seed < _SEEDS:
        said = f"Recipe key 'seed' is {shortened(recipe.seed)}: it is a number from 0 to 2**63 - 1."
        raise RecipeError(said + read.blame("seed"))
    try:
        check_models(recipe)
    except RecipeError as error:
        spoken = str(error).lower()
        about = [key for key in _TOGETHER if key.replace("_", " ") in spoken and key in content and key not in given]
        raise RecipeError(f"{error}{read.blame(*about[:1])}") from error
    return recipe


def check_models(recipe: FusionRecipe) -> None:
    """Checks what several fields say together: models, weights, target.

    Raises:
        RecipeError: Says which field does not fit, and how to correct it.
    """
    if any("\0" in name for name in (*recipe.models, recipe.output)):
        raise RecipeError("A file name holds a zero byte, which no file name can. Correct 'models' or 'output'.")
    count = len(recipe.models)
    if count < 2 and (count < 1 or isinstance(recipe.target, int)):
        raise RecipeError(
            f"A fusion needs at least two models; {count} given. Name the checkpoints: mergeot fuse A B. "
            "(One model is fused into other sizes with --target SPEC.)"
        )
    check_model_weights(recipe.model_weights or recipe.weights, count)
    if isinstance(recipe.target, int) and not 0 <= recipe.target < count:
        raise RecipeError(
            f"target {recipe.target} does not exist: with {count} models it is 0 to {count - 1}, or an architecture "
            "SPEC."
        )
    if recipe.format not in FORMATS:
        raise RecipeError(
            f"'{shortened(recipe.format)}' is no format: it is {', '.join(FORMATS[:-1])} or {FORMATS[-1]}. A file "
            "named .safetensors, .npz or .pt2 has the format of its name."
        )
    if len(recipe.arch) not in (0, 1, count):
        raise RecipeError(
            f"{len(recipe.arch)} architectures for {count} models: give --arch once for all, or once each."
        )


def check_model_weights(weights: tuple[float, ...], count: int) -> None:
    """Checks that there is one weight per model, none negative, and some above zero.

    Raises:
        RecipeError: Says which condition fails.
    """
    shown = ", ".join(f"{weight:g}" for weight in weights)
    if len(weights) != count:
        raise RecipeError(f"{len(weights)} model weights ({shown}) for {count} models: give one per model, in order.")
    if any(not math.isfinite(weight) or weight < 0 for weight in weights):
        raise RecipeError(f"Model weights {shown}: each must be a number of at least zero (zero leaves a model out).")
    if not 0 < math.fsum(weights) < math.inf:
        raise RecipeError(f"Model weights {shown} sum to {math.fsum(weights):g}: some model has to count.")


def _named_as_source(content: Mapping[str, Any]) -> dict[str, str]:
    """Returns the output whose ending says the container of the source whose sizes it takes, where names say it."""
    models, target = content.get("models"), content.get("target", 0)
    place = target if isinstance(target, int) else 0
    if not isinstance(models, list | tuple) or not 0 <= place < len(models) or not isinstance(models[place], str):
        return {}
    if os.path.isdir(models[place]):
        return {"output": _FOLDER}
    suffix = Path(models[place]).suffix
    return {"output": f"fused{suffix}"} if suffix in _KEPT_SUFFIXES else {}


@dataclasses.dataclass(frozen=True)
class _ReadRecipe:
    """Keys and values of a recipe file, and where they stand in it."""

    content: dict[str, Any]
    file: YamlFile | None = None
    ways: Mapping[str, tuple[str | int, ...]] = dataclasses.field(default_factory=dict)

    def blame(self, *way: str | int) -> str:
        """Returns a sentence that says where a value stands; nothing where there is no file."""
        if self.file is None:
            return ""
        key, *further = way or ("",)
        start = self.ways.get(str(key), (key,))
        where = self.file.where(*start, *further)
        return f" It stands in {where}." if way else f" The recipe is '{self.file.path}'."


def place_in_recipe(path: Path | None, key: str, value: object) -> str:
    """Returns the sentence that says where in a recipe file a key has a value; nothing where it has it not there."""
    read = _ReadRecipe({}) if path is None else _read(path)
    return read.blame(key) if read.content.get(key) == value else ""


def _read(path: Path, notify: Notify | None = None) -> _ReadRecipe:
    file = read_yaml(path, RecipeError)
    if not isinstance(file.content, Mapping):
        raise RecipeError(f"'{path}' is not a recipe: expected keys and values, such as 'solver: wb'.")
    known: dict[str, Any] = {}
    ways: dict[str, tuple[str | int, ...]] = {}
    for key, value in file.content.items():
        name = key.replace("-", "_")
        if name in known:
            raise RecipeError(f"Recipe key '{shortened(key)}' is there twice in '{path}', with '-' and with '_'.")
        known[name], ways[name] = value, (key,)
    if is_mergekit(file.content):
        foreign = translated(file, recipe_keys())
        known, ways = foreign.content, foreign.lines
        if notify is not None:
            for note in foreign.notes:
                notify(f"{path}: {note}")
    for single in ("arch", "models", "trust", "ignore", "inputs"):
        if isinstance(known.get(single), str):
            known[single] = [known[single]]
    return _ReadRecipe(known, file, ways)


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    key = str(problem["loc"][0]) if problem["loc"] else "recipe"
    names = recipe_keys()
    if problem["type"] == "unexpected_keyword_argument":
        close = difflib.get_close_matches(shortened(key), names, n=1, cutoff=0.5)
        guess = f" Did you mean '{close[0]}'?" if close else ""
        return f"Unknown recipe key '{shortened(key)}'.{guess} Valid keys: {', '.join(names)}."
    value = problem.get("input")
    rule = problem["msg"].replace("valid tuple", "list")
    said = f"Recipe key '{key}' is {_shown(value)}: {rule[0].lower()}{rule[1:]}."
    if problem["type"] in _TYPES and isinstance(value, str) and not isinstance(yaml.safe_load(value[:20]), str):
        said += " Write it without quotes."
    means = FusionRecipe.__dataclass_fields__[key].metadata.get("help") if key in names else None
    return f"{said} It is: {means}" if means else said


def _shown(value: object) -> str:
    text = repr(value) if isinstance(value, str | list | tuple | dict) and len(value) < 40 else shortened(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
