"""mergekit's YAML as a recipe of ours: its models, weights, base and types, with one of our solvers as the method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mergekit_ot.errors import RecipeError, unknown_name
from mergekit_ot.recipe_files.own_methods import OWN_METHODS, layer_count, own_method_hint
from mergekit_ot.storage.limits import shortened
from mergekit_ot.storage.yaml_files import YamlFile

_KEYS = ("merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype")
_REFUSED = {
    "tokenizer_source": "the fused model keeps the vocabulary of its sources, which has to be the same in all of them",
    "tokenizer": "the fused model keeps the vocabulary of its sources, which has to be the same in all of them",
    "chat_template": "mergeot writes weights, and leaves templates as they are",
    "modules": "whole networks of one architecture are fused",
}
# Larger numbers are no weights, and some are no numbers that a machine has.
_MOST = 1e300
_ENTRY_KEYS = ("model", "parameters", "layer_range")
_IGNORED_PARAMETERS = ("int8_mask", "rescale")


@dataclass(frozen=True)
class Translated:
    """A recipe of ours that says what one of mergekit's says.

    Attributes:
        content: Keys and values of a recipe.
        lines: Key of ours → the way to what it comes from in the file.
        notes: Sentences about what was left out or changed.
    """

    content: dict[str, Any]
    lines: dict[str, tuple[str | int, ...]]
    notes: tuple[str, ...] = ()


def is_mergekit(content: Mapping[str, Any]) -> bool:
    """Whether the content of a recipe has mergekit's form.

    Example:
        >>> is_mergekit({"models": ["a.pt", "b.pt"], "solver": "wb"}), is_mergekit({"merge_method": "wb"})
        (False, True)
    """
    models = content.get("models")
    has_mappings = isinstance(models, list) and any(isinstance(entry, Mapping) for entry in models)
    return "merge_method" in content or "slices" in content or has_mappings


def translated(file: YamlFile, own_keys: Sequence[str]) -> Translated:
    """Returns the recipe of ours that a recipe of mergekit stands for.

    Args:
        file: What stands in it.
        own_keys: Keys of a recipe of ours, which may stand in it too, such as ``arch``.

    Raises:
        RecipeError: It asks for a method of mergekit, or for what cannot be had; names the line.
    """
    return _Recipe(file, tuple(own_keys)).translated()


class _Recipe:
    """One recipe of mergekit, read key by key."""

    def __init__(self, file: YamlFile, own_keys: tuple[str, ...]) -> None:
        self.file, self.own_keys = file, own_keys
        self.given: Mapping[str, Any] = file.content
        self.notes: list[str] = []
        self.lines: dict[str, tuple[str | int, ...]] = {}

    def translated(self) -> Translated:
        """Returns the recipe of ours."""
        self._check_keys()
        method = self._method()
        entries, ways = self._entries()
        models = [self._model_name(entry, way) for entry, way in zip(entries, ways, strict=True)]
        if method in OWN_METHODS:
            self._refuse_method(method, models)
        content: dict[str, Any] = {"models": models, "solver": method}
        self.lines |= {"models": ways[0][:1], "solver": ("merge_method",)}
        self._add_weights(content, entries, ways)
        self._add_parameters(content)
        self._add_base(content, models)
        for key in ("dtype", "out_dtype"):
            if self.given.get(key) is not None:
                content["dtype"] = self.given[key]
                self.lines["dtype"] = (key,)
        own = {key.replace("-", "_"): key for key in self.given if key.replace("-", "_") in self.own_keys}
        for name, key in own.items():
            if name not in (*_KEYS, "solver", "model_weights"):
                given, rules = self.given[key], content.get(name, [])
                content[name] = [*rules, *given] if rules and _are_mappings(given) else given
                self.lines[name] = (key,)
        return Translated(content, self.lines, tuple(self.notes))

    def _refuse(self, text: str, *way: str | int) -> NoReturn:
        raise RecipeError(f"{text} ({self.file.where(*way)}, a recipe of mergekit)")

    def _method(self) -> str:
        if "merge_method" not in self.given:
            self._refuse(
                "Models are mappings here, as mergekit has them, and 'merge_method' is not there: add 'merge_method: "
                "wb', or another solver ('mergeot plugins' lists them).",
                next(iter(self.given)),
            )
        method = self.given["merge_method"]
        if not isinstance(method, str) or not method:
            self._refuse(
                f"merge_method is {shortened(repr(method))}, and has to be the name of a solver.", "merge_method"
            )
        plain = method.replace("-", "_").lower()
        # Solvers of ours have hyphens in their names.
        return plain if plain in OWN_METHODS else method.replace("_", "-")

    def _check_keys(self) -> None:
        for key in self.given:
            name = key.replace("-", "_")
            if name in _REFUSED:
                self._refuse(f"'{key}' is not understood: {_REFUSED[name]}. Delete the line.", key)
            if name in ("solver", "model_weights") and "merge_method" in self.given:
                instead = "merge_method" if name == "solver" else "the weights under models"
                self._refuse(f"'{key}' says the same as {instead}. Delete one of the two.", key)
            if name not in (*_KEYS, *self.own_keys):
                sentence = unknown_name("recipe key", shortened(key), {*_KEYS, *self.own_keys})
                self._refuse(sentence.replace("Known:", "Valid keys:"), key)

    def _entries(self) -> tuple[list[Any], list[tuple[str | int, ...]]]:
        """Returns the models' entries, and the ways to them."""
        if "slices" not in self.given:
            models = self.given.get("models")
            if not isinstance(models, list) or not models:
                self._refuse("'models' has to be a list of models, such as '- model: a.pt'.", "models")
            return models, [("models", place) for place in range(len(models))]
        if "models" in self.given:
            self._refuse("'models' and 'slices' are both given. Delete one of the two.", "slices")
        slices = self.given["slices"]
        sources = slices[0].get("sources") if _are_mappings(slices) and len(slices) == 1 else None
        if not isinstance(sources, list) or not _are_mappings(sources) or not sources:
            self._refuse(
                "It takes slices of layers, which cannot be had here: whole networks of one architecture are fused. "
                "List whole models under 'models', or one slice with the sources and all their layers.",
                "slices",
            )
        ways: list[tuple[str | int, ...]] = [("slices", 0, "sources", place) for place in range(len(sources))]
        extra = [key for key in slices[0] if key not in ("sources", "parameters")]
        if extra or slices[0].get("parameters"):
            self._refuse("Parameters of a slice are not understood: give them to the models.", "slices", 0)
        return sources, ways

    def _model_name(self, entry: Any, way: tuple[str | int, ...]) -> str:
        if isinstance(entry, str):
            return entry
        if not isinstance(entry, Mapping) or not isinstance(entry.get("model"), str):
            self._refuse("A model is '- model: NAME' here, with NAME a file or a folder.", *way)
        for key in entry:
            if key not in _ENTRY_KEYS:
                sentence = unknown_name("key of a model", shortened(key), _ENTRY_KEYS)
                self._refuse(sentence.replace("Known:", "Valid keys:"), *way, key)
        name = entry["model"]
        if "layer_range" in entry:
            self._check_range(name, entry["layer_range"], (*way, "layer_range"))
        return name

    def _check_range(self, name: str, given: Any, way: tuple[str | int, ...]) -> None:
        """Checks that a range of layers is all of them."""
        is_range = isinstance(given, list) and len(given) == 2 and all(type(end) is int for end in given)
        count = layer_count(Path(name))
        if is_range and count is not None and given == [0, count]:
            return
        has = f"'{shortened(name)}' has {count}" if count else f"how many '{shortened(name)}' has is not known"
        self._refuse(
            f"layer_range {shortened(str(given))} takes slices of layers, unless it is all of them ({has}), which "
            "cannot be had here: whole networks are fused. Leave layer_range out to take a model whole.",
            *way,
        )

    def _refuse_method(self, method: str, models: Sequence[str]) -> NoReturn:
        base = self.given.get("base_model")
        self._refuse(own_method_hint(method, models, base if isinstance(base, str) else None), "merge_method")

    def _add_weights(
        self, content: dict[str, Any], entries: Sequence[Any], ways: Sequence[tuple[str | int, ...]]
    ) -> None:
        common = self.given.get("parameters")
        default = common.get("weight") if isinstance(common, Mapping) else None
        weights = []
        for entry, way in zip(entries, ways, strict=True):
            own = entry.get("parameters") or {} if isinstance(entry, Mapping) else {}
            if not isinstance(own, Mapping):
                self._refuse("'parameters' has to hold names and values, such as 'weight: 0.5'.", *way, "parameters")
            for key in own:
                if key != "weight":
                    self._refuse(
                        f"Parameter '{shortened(key)}' of a single model is not understood. Valid keys: weight.",
                        *way,
                        "parameters",
                        key,
                    )
            weight = own.get("weight", default)
            weights.append(weight if weight is None else self._weight(weight, (*way, "parameters", "weight")))
        if all(weight is None for weight in weights):
            return
        if None in weights:
            place = weights.index(None)
            self._refuse("This model has no weight, and others have one: give one to each.", *ways[place])
        self.lines["model_weights"] = ways[0][:1]
        self._put_weights(content, weights, ways)

    def _weight(self, weight: Any, way: tuple[str | int, ...]) -> Any:
        if isinstance(weight, list) and weight and all(map(_is_number, weight)):
            return [float(part) for part in weight]
        if isinstance(weight, list | Mapping):
            self._refuse(
                "Weights by filters are not understood: a weight is a number, or a list of numbers over the layers.",
                *way,
            )
        if not _is_number(weight) or not weight >= 0:
            self._refuse(f"The weight {shortened(str(weight))} has to be a number of at least zero.", *way)
        return float(weight)

    def _put_weights(self, content: dict[str, Any], weights: list[Any], ways: Sequence[tuple[str | int, ...]]) -> None:
        lists = [place for place, weight in enumerate(weights) if isinstance(weight, list)]
        if lists:
            if "layers" not in self.own_keys:
                said = "Weights over the layers (lists) cannot be had here: give one number to each model."
                self._refuse(said, *ways[lists[0]], "parameters", "weight")
            content["layers"] = [{"parameters": "*", "weights": weights}]
            return
        total = sum(weights)
        if total <= 0:
            self._refuse("All weights are zero: some model has to count.", "models")
        if abs(total - 1) > 1e-6:
            parameters = self.given.get("parameters")
            if isinstance(parameters, Mapping) and parameters.get("normalize") is False:
                self._refuse(
                    f"The weights sum to {total:g}, and mergeot takes means: normalize has to be true.", "parameters"
                )
            self.notes.append(f"The weights sum to {total:g} and are divided by it.")
        content["model_weights"] = [weight / total for weight in weights]

    def _add_parameters(self, content: dict[str, Any]) -> None:
        given = self.given.get("parameters")
        if given is None:
            return
        if not isinstance(given, Mapping):
            self._refuse("'parameters' has to hold names and values, such as 'normalize: true'.", "parameters")
        options = {key: value for key, value in given.items() if key not in ("weight", "normalize")}
        for key in _IGNORED_PARAMETERS:
            if key in options:
                del options[key]
                self.notes.append(f"Parameter '{key}' is about mergekit's own methods and is left out.")
        if options:
            content["solver_options"] = options
            self.lines["solver_options"] = ("parameters",)

    def _add_base(self, content: dict[str, Any], models: Sequence[str]) -> None:
        base = self.given.get("base_model")
        if base is None:
            return
        if not isinstance(base, str):
            self._refuse("'base_model' has to be the name of a model.", "base_model")
        if base in models:
            content.setdefault("target", models.index(base))
            self.lines["target"] = ("base_model",)
            self.notes.append(
                f"base_model '{base}' is the target: the fused model has its sizes and its order of neurons."
            )
        else:
            self.notes.append(f"base_model '{base}' is left out: no solver of mergeot has a base besides the models.")


def _are_mappings(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, Mapping) for value in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) > _MOST
