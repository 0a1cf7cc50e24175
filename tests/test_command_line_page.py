"""The page on the command line names every flag of every command, and no flag that does not exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.core import TyperCommand, TyperGroup

from mergekit_ot import default_manager
from mergekit_ot.cli.app import build_app
from mergekit_ot.fusion.options import FusionOptions
from mergekit_ot.recipe import recipe_keys

PAGE = (Path(__file__).parent.parent / "docs" / "reference" / "command-line.md").read_text(encoding="utf-8")
# A flag in code, such as `--solver`, `-o` or `mergeot --version`.
_FLAG = re.compile(r"`(?:mergeot )?(--?[a-z][a-z-]*)`")


def flags_of_commands() -> dict[str, set[str]]:
    """Returns the flags of each command, those of its subcommands included; the program's own under an empty name."""
    program = typer.main.get_command(build_app(default_manager()))
    flags = {name: set(all_flags(command)) for name, command in program.commands.items()}
    return {"": own_flags(program), **flags}


def all_flags(command: TyperCommand | TyperGroup) -> Iterator[str]:
    """Yields the flags of a command and of all that stand below it."""
    yield from own_flags(command)
    for below in command.commands.values() if isinstance(command, TyperGroup) else ():
        yield from all_flags(below)


def own_flags(command: TyperCommand | TyperGroup) -> set[str]:
    """Returns the flags of a command in all their spellings; its arguments have none."""
    spelled = [spelling for parameter in command.params for spelling in (*parameter.opts, *parameter.secondary_opts)]
    return {spelling for spelling in spelled if spelling.startswith("-")}


def sections(page: str) -> dict[str, str]:
    """Returns the section of each command, and what all share under an empty name."""
    pieces = re.split(r"^## (?:What all commands share|mergeot (\w+))$", page, flags=re.MULTILINE)
    return {name or "": body for name, body in zip(pieces[1::2], pieces[2::2], strict=True)}


def unnamed(page: str, command: str) -> set[str]:
    """Returns the flags of a command that its section does not name."""
    return flags_of_commands()[command] - set(_FLAG.findall(sections(page)[command]))


def invented(page: str, command: str) -> set[str]:
    """Returns the flags that the tables of a section name, and the command does not have."""
    rows = re.findall(r"^\|([^|]*)\|", sections(page)[command], flags=re.MULTILINE)
    return set(_FLAG.findall(" ".join(rows))) - flags_of_commands()[command]


@pytest.mark.parametrize("command", sorted(flags_of_commands()))
def test_a_section_names_the_flags_of_its_command(command):
    assert unnamed(PAGE, command) == set()
    assert invented(PAGE, command) == set()


def test_every_command_has_a_section_and_every_section_a_command():
    assert set(sections(PAGE)) == set(flags_of_commands())
    assert len(flags_of_commands()) >= 10


def test_a_flag_that_is_left_out_or_made_up_is_found():
    flags = sorted(flags_of_commands()["fuse"])
    assert len(flags) > 20
    for flag in flags:
        assert unnamed(PAGE.replace(f"`{flag}`", "`flag`"), "fuse") == {flag}
    row = "| `--solver` NAME | as for `fuse` |"
    assert row in sections(PAGE)["align"]
    assert invented(PAGE.replace(row, "| `--solvent` NAME | as for `fuse` |"), "align") == {"--solvent"}


def test_the_keys_of_a_recipe_are_those_that_the_page_lists():
    listed = re.search(r"^A recipe has the flags' names: (.*?)\.\n\n", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert listed is not None
    assert set(re.findall(r"`(\w+)`", listed[1])) == set(recipe_keys())


def test_the_defaults_of_choices_are_those_of_the_page():
    """Numbers and names that stand in the column of defaults are those of the options."""
    rows = re.findall(r"^\| `(--[a-z-]+)`[^|]*\|[^|]*\| `?([^|`]*)`? \|$", sections(PAGE)["fuse"], flags=re.MULTILINE)
    fields = {f"--{name.replace('_', '-')}": value for name, value in vars(FusionOptions()).items()}
    compared = {flag: default for flag, default in rows if isinstance(fields.get(flag), int | str) and default != "off"}
    assert len(compared) >= 7
    assert {flag: str(fields[flag]) for flag in compared} == compared
