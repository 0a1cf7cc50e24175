"""Writes docs/reference/recipe-keys.md from the recipe itself: python docs/site/recipe_keys.py."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from mergekit_ot.fusion.options import FusionOptions
from mergekit_ot.recipe import FusionRecipe, recipe_keys
from mergekit_ot.scoring.data_options import DataOptions
from mergekit_ot.storage.file_options import FileOptions, WritingOptions

PAGE = Path(__file__).parents[1] / "reference" / "recipe-keys.md"
_HEAD = """\
# Keys of a recipe

A [recipe](../how-to/recipes.md) is a YAML file for `mergeot fuse --recipe`. This table is written by
`docs/site/recipe_keys.py` from the program. Keys may be written with `-` or `_`. Most have a [flag of the same
name](command-line.md#mergeot-fuse), which overrides the file.

| key | kind | default | what it says |
|---|---|---|---|
"""
# What JSON schema calls it → what a writer of YAML calls it.
_KINDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}
_KINDS |= {"array": "list", "object": "mapping", "null": ""}
_ATTRIBUTE = re.compile(r"^    (\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)


def page() -> str:
    """Returns the page as it should be."""
    said = descriptions()
    kinds = TypeAdapter(FusionRecipe).json_schema()["properties"]
    fields = {field.name: field for field in dataclasses.fields(FusionRecipe)}
    rows = [f"| `{key}` | {kind(kinds[key])} | {default(fields[key])} | {said[key]} |" for key in recipe_keys()]
    return _HEAD + "\n".join(rows) + "\n"


def descriptions() -> dict[str, str]:
    """Returns key → what the docstring of its record says, on one line."""
    said: dict[str, str] = {}
    for record in (DataOptions, FileOptions, WritingOptions, FusionOptions, FusionRecipe):
        attributes = (inspect.getdoc(record) or "").partition("\nAttributes:\n")[2].partition("\n\n")[0]
        said |= {name: " ".join(words.split()) for name, words in _ATTRIBUTE.findall(attributes)}
    return {key: words.replace("|", "\\|").replace("``", "`") for key, words in said.items()}


def kind(schema: dict[str, Any]) -> str:
    """Returns what a value may be, in words."""
    kinds = [_KINDS[one["type"]] for one in schema.get("anyOf", [schema])]
    items = schema.get("items") or next((one["items"] for one in schema.get("anyOf", ()) if "items" in one), {})
    of = {"string": "texts", "integer": "whole numbers", "number": "numbers", "object": "mappings"}
    words = " or ".join(word for word in kinds if word)
    return words.replace("list", f"list of {of[items['type']]}") if "type" in items else words


def default(field: dataclasses.Field[Any]) -> str:
    """Returns the default as YAML has it; nothing where there is none."""
    made = field.default_factory() if field.default is dataclasses.MISSING else field.default
    if made is None or made == () or made == {}:
        return ""
    return f"`{str(made).lower() if isinstance(made, bool) else made}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
