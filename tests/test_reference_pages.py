"""The reference: every public name, every hook, every key of a recipe and every JSON object has its place."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path

import typer

import mergekit_ot
import mergekit_ot.testing
from mergekit_ot import default_manager
from mergekit_ot.cli.app import build_app
from mergekit_ot.cli.described import with_descriptions
from mergekit_ot.cli.docs import installed_pages
from mergekit_ot.hooks import hookspecs

DOCS = Path(__file__).parent.parent / "docs"
REFERENCE = DOCS / "reference"
PARTS = ("tutorials", "how-to", "reference", "explanation")


def text_of(name: str) -> str:
    return (REFERENCE / f"{name}.md").read_text(encoding="utf-8")


def test_every_public_name_is_on_the_page_once() -> None:
    listed = re.findall(r"^::: (mergekit_ot\S*)$", text_of("api"), re.MULTILINE)
    public = {f"mergekit_ot.{name}" for name in mergekit_ot.__all__ if name != "__version__"}
    checks = {f"mergekit_ot.testing.{name}" for name in mergekit_ot.testing.__all__}
    assert sorted(listed) == sorted(public | checks)


def test_a_terminal_shows_signature_and_docstring_of_every_name() -> None:
    shown = with_descriptions(text_of("api"))
    assert ":::" not in shown
    for name in mergekit_ot.__all__:
        thing = getattr(mergekit_ot, name)
        if inspect.isclass(thing) or inspect.isroutine(thing):
            assert f"\n### `{name}`\n" in shown
            assert inspect.getdoc(thing).splitlines()[0] in shown
    assert "solver_options: Mapping[str, object] | None = None" in shown


def test_a_terminal_shows_every_hook() -> None:
    shown = with_descriptions(text_of("hooks"))
    hooks = {name for name in vars(hookspecs) if name.startswith("mergeot_")}
    assert set(re.findall(r"^### `(mergeot_\w+)`$", shown, re.MULTILINE)) == hooks


def test_the_keys_of_a_recipe_are_those_of_the_program() -> None:
    spec = importlib.util.spec_from_file_location("written", DOCS / "site" / "recipe_keys.py")
    written = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(written)
    assert text_of("recipe-keys") == written.page(), "run: python docs/site/recipe_keys.py"


def test_every_command_that_prints_json_is_on_the_page() -> None:
    commands = typer.main.get_command(build_app(default_manager())).commands
    printing = {name for name, command in commands.items() if any("--json" in one.opts for one in command.params)}
    nested = {name for name, command in commands.items() if "commands" in vars(command)}
    rows = set(re.findall(r"^\| `(\w+)` \|", text_of("json"), re.MULTILINE))
    assert printing <= rows <= printing | nested


def test_every_page_is_in_the_index_and_has_a_name_of_its_own() -> None:
    pages = [page.relative_to(DOCS) for part in PARTS for page in sorted((DOCS / part).glob("*.md"))]
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert [page.as_posix() for page in pages if f"({page.as_posix()})" not in index] == []
    assert {page.stem for page in pages} <= set(installed_pages())
    assert len({page.stem for page in DOCS.rglob("*.md")}) == len(list(DOCS.rglob("*.md")))


def test_names_of_pages_from_before_there_were_parts_lead_to_them() -> None:
    before = {"architecture", "command-line", "glossary", "repairs", "results", "side-by-side", "solvers", "tracing"}
    assert before | {"writing-plugins"} <= set(installed_pages())
