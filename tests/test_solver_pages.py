"""The page on solvers names every registered solver and exactly its options, with their defaults."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from mergekit_ot import RecipeError, default_manager
from mergekit_ot.transport.options import check_option, option_hints

PAGE = Path(__file__).parent.parent / "docs" / "explanation" / "solvers.md"


def sections() -> dict[str, str]:
    """Returns the sections of solvers by name."""
    parts = re.split(r"^## `(.+)`$|^## .+$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: body for name, body in zip(parts[1::2], parts[2::2], strict=True) if name}


def options_in(text: str) -> dict[str, str]:
    """Returns option → default of the table in a section."""
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text, flags=re.MULTILINE)
    return {name: default.strip() for name, default in rows}


def values_in(text: str) -> dict[str, str]:
    """Returns option → what its value may be, in the words of the table in a section."""
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \| [^|]+ \|$", text, flags=re.MULTILINE)
    return {name: words.strip() for name, words in rows}


def spelled(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def test_every_registered_solver_has_a_section():
    assert set(sections()) == set(default_manager().solvers)


@pytest.mark.parametrize("name", sorted(default_manager().solvers))
def test_the_options_of_a_solver_are_those_of_its_table(name):
    fields = dataclasses.fields(default_manager().get("solver", name))
    assert options_in(sections()[name]) == {field.name: spelled(field.default) for field in fields}


@pytest.mark.parametrize("name", sorted(default_manager().solvers))
def test_what_an_option_may_be_is_said_in_the_words_of_the_message(name):
    hints = option_hints(default_manager().get("solver", name))
    said = {}
    for option, hint in hints.items():
        with pytest.raises(RecipeError) as raised:
            check_option(f"solver '{name}'", option, hint, None)
        said[option] = str(raised.value).removeprefix(f"Option {option} of solver '{name}' is None: ").removesuffix(".")
    assert values_in(sections()[name]) == said


def test_the_page_is_in_the_index():
    assert "(explanation/solvers.md)" in (PAGE.parents[1] / "index.md").read_text(encoding="utf-8")


def test_links_and_commands_of_the_page_lead_somewhere():
    text = PAGE.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 20
    for link in links:
        place, _, anchor = link.partition("#")
        assert anchor in anchors if not place else (PAGE.parent / place).is_file(), link
    files = re.findall(r"tests/[\w/]+\.py", text)
    assert len(files) >= 3
    assert all((PAGE.parents[2] / file).is_file() for file in files)
