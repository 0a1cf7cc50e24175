"""The command ``mergeot docs``: the documentation, wherever the package is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mergekit_ot.cli import output
from mergekit_ot.cli.described import with_descriptions
from mergekit_ot.cli.options import Json
from mergekit_ot.errors import RecipeError, unknown_name

_PACKAGE = Path(__file__).parent.parent
# The parts of the documentation, in the order of first reading.
_PARTS = ("", "tutorials", "how-to", "reference", "explanation")


def docs(
    page: Annotated[
        str | None, typer.Argument(metavar="[PAGE]", show_default=False, help="Which page; without it, all are listed.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a page of the documentation, or list the pages: they are installed with the program."""
    pages = installed_pages()
    if page is None:
        rows = [{"page": name, "title": title_of(path), "part": part_of(path)} for name, path in pages.items()]
        if as_json:
            output.show_json({"pages": rows})
            return
        output.show_table(rows, title="Pages: mergeot docs PAGE")
        return
    page = Path(page).stem.lower() if page.endswith(".md") else Path(page).name.lower()
    if page not in pages:
        raise RecipeError(unknown_name("page", page, [name for name in pages if part_of(pages[name]) != "decisions"]))
    text = with_descriptions(pages[page].read_text(encoding="utf-8"))
    if as_json:
        output.show_json({"page": page, "title": title_of(pages[page]), "text": text})
        return
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(text))
        return
    print(text, end="")


def installed_pages() -> dict[str, Path]:
    """Returns the pages by name, part by part: those installed with the package, or those of the checkout.

    Raises:
        RecipeError: The installation holds no documentation.
    """
    folders = (_PACKAGE / "docs", _PACKAGE.parent / "docs")
    folder = next((folder for folder in folders if (folder / "index.md").is_file()), None)
    if folder is None:
        raise RecipeError("This installation holds no documentation. Install mergekit-ot again, from a wheel.")
    changelogs = (folder / "changelog.md", folder.parent / "CHANGELOG.md")
    files = [*folder.rglob("*.md"), *(file for file in changelogs[1:] if not changelogs[0].exists() and file.exists())]
    return {path.stem.lower(): path for path in sorted(files, key=lambda path: (_place(path), path.name))}


def part_of(path: Path) -> str:
    """Returns the part of the documentation that a page belongs to: tutorials, how-to …; none for the first ones."""
    folder = path.parent.name
    return folder if folder in (*_PARTS, "decisions") else ""


def _place(path: Path) -> int:
    part = part_of(path)
    return _PARTS.index(part) if part in _PARTS else len(_PARTS)


def title_of(path: Path) -> str:
    """Returns the title of a page: its first heading."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.removeprefix("# ") for line in lines if line.startswith("# ")), path.stem)
