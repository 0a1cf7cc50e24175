"""Recipes: YAML that unfolds, that is no YAML, and settings that are not what they should be."""

from __future__ import annotations

from hostile.case import Case, raw

_COMMAND = ("fuse", "--recipe", "FILE")
_MODELS = "models: [a.pt, b.pt]\n"
_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def _case(name: str, content: str | bytes, *says: str) -> Case:
    text = content if isinstance(content, bytes) else content.encode()
    return Case(f"recipe: {name}", "bad.yaml", raw(text), says, _COMMAND)


def _value(name: str, line: str, *says: str) -> Case:
    return _case(name, f"{_MODELS}{line}\n", f"'{line.partition(':')[0]}'", *says)


RECIPES: list[Case] = [
    _case("billion laughs", _LAUGHS, "MERGEOT_MAX_RECIPE_VALUES"),
    _case("laughs in the models", f"{_LAUGHS}models: *i\n", "MERGEOT_MAX_RECIPE_VALUES"),
    _case("reference to itself", "models: &a [*a]\n", "'*a'"),
    _case("reference to nothing", "models: *b\n", "'*b'"),
    _case("nested 3,000 deep", f"models: {'[' * 3000}{']' * 3000}\n", "MERGEOT_MAX_RECIPE_DEPTH"),
    _case("nested without end", "models: " + "[" * 60_000, "MERGEOT_MAX_RECIPE_DEPTH"),
    _case("nested by lines", "".join(" " * depth + "a:\n" for depth in range(200)), "MERGEOT_MAX_RECIPE_DEPTH"),
    _case("a megabyte", f"{_MODELS}# {'x' * 1_000_000}\n", "MERGEOT_MAX_RECIPE_BYTES"),
    _case("tag that makes an object", "models: !!python/object/apply:os.system ['touch executed']\n", "tag", "line 1"),
    _case("tag of a number", f"{_MODELS}seed: !!int x\n", "tag", "line 2"),
    _case("tag without a name", f"{_MODELS}seed: ! x\n", "tag"),
    _case("number of 5,000 digits", f"{_MODELS}seed: {'9' * 5000}\n", "digits"),
    _case("date that is none", f"{_MODELS}seed: 2020-13-45\n", "bad.yaml"),
    _case("one key twice", f"{_MODELS}seed: 1\nseed: 2\n", "'seed'", "line 3", "twice"),
    _case(
        "one key in two spellings", f"{_MODELS}model-weights: [1, 0]\nmodel_weights: [0, 1]\n", "model_weights", "twice"
    ),
    _case("key twice in the options", f"{_MODELS}solver_options: {{alpha: 1, alpha: 2}}\n", "'alpha'", "twice"),
    _case("number as a key", f"{_MODELS}5: 3\n", "Key 5", "line 2"),
    _case("true as a key", f"{_MODELS}yes: 3\n", "Key yes", "line 2"),
    _case("list as a key", f"{_MODELS}[1, 2]: 3\n", "line 2"),
    _case("number as an option", f"{_MODELS}solver_options: {{1: 2}}\n", "Key 1"),
    _case("no mapping", "- wb\n", "not a recipe"),
    _case("empty", "", "not a recipe"),
    _case("two documents", f"{_MODELS}---\nseed: 1\n", "not valid YAML"),
    _case("bracket that stays open", "models: [a\n", "not valid YAML"),
    _case("tab", "models:\n\t- a\n", "tabs"),
    _case("question mark without quotes", f"{_MODELS}arch: [nets.py:net?h=3]\n", "quotes"),
    _case("another encoding", "models: [ä.pt]\n".encode("latin-1"), "not valid YAML"),
    _case("sixteen bits", _MODELS.encode("utf-16"), "not valid YAML"),
    _case("control character", "models: [a\x00b, c]\n", "not valid YAML"),
    _case("name with a zero byte", 'models: ["a\\0b", c]\n', "no file"),
    _case("name of 5,000 letters", f"models: [{'a' * 5000}, c]\n", "aaaa"),
    _case(
        "recipe of mergekit", "models:\n  - model: a\n    parameters: {weight: 1}\nmerge_method: linear\n", "mergekit"
    ),
    _case("mapping as a model", "models: [{model: a}, {model: b}]\n", "mergekit"),
    _case("key with a wrong letter", f"{_MODELS}solvr: wb\n", "'solvr'", "'solver'"),
    _case("key of a megabyte", f"{_MODELS}? {'x' * 50_000}\n: 1\n", "Unknown recipe key"),
    _value("text as a boolean", "refine: 'false'", "boolean", "without quotes"),
    _value("number as a boolean", "refine: 1", "boolean"),
    _value("text as a number", "seed: '3'", "integer", "without quotes"),
    _value("boolean as a number", "seed: true", "integer"),
    _value("fraction as a count", "restarts: 1.5", "integer"),
    _value("whole fraction as a count", "restarts: 2.0", "integer"),
    _value("negative seed", "seed: -1", "from 0"),
    _value("seed of 100 digits", f"seed: {'9' * 100}", "from 0"),
    _value("not a number", "trace_seconds: .nan", "greater than 0"),
    _value("infinity", "trace_seconds: .inf", "seconds"),
    _value("weights that are text", "model_weights: ['0.5', '0.5']", "number", "without quotes"),
    _value("weights that are true", "model_weights: [true, false]", "number"),
    _case("weights that are not numbers", f"{_MODELS}model_weights: [.nan, 1]\n", "at least zero"),
    _value("weights that are one text", "model_weights: half", "list"),
    _value("models that are numbers", "target: [0]", "integer"),
    _value("empty input shape", "input_shape: []", "at least 1"),
    _value("negative input shape", "input_shape: [-8]", "greater than or equal to 1"),
    _value("input shape of text", "input_shape: 1,28,28", "list"),
    _value("nested input shape", "input_shape: [[8]]", "integer"),
    _value("options that are a list", "solver_options: [a]", "dictionary"),
    _value("no calibration", "calibration_size: 0", "greater than or equal to 1"),
]
