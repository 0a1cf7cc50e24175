"""Paths, modules and links that the documentation names exist."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
# Files of the reader's own that examples speak of.
OF_THE_READER = {
    "example_greedy_matching.py",
    "file.py",
    "gpt.py",
    "main.py",
    "mergeot-demo/",
    "mine.py",
    "mergeot_nearest/__init__.py",
    "nets.py",
    "path/to/file.py",
    "resnet.py",
    "rows.py",
    "test_greedy.py",
    "tests/test_solver.py",
}
# Paths are read from the checkout, from the package, and from the folder of the page.
_OURS = re.compile(r"(?<![\w./-])((?:mergekit_ot|plugins|tests|docs|\.ci)/[\w./*-]*)")
_MODULE = re.compile(r"(?<![\w./])mergekit_ot(?:\.\w+)+")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_WORDS = re.compile(r"`([^`\n]+)`")
_LOCAL = re.compile(r"([\w.-]+(?:/[\w.-]+)*(?:\.py|/))(?:::?\w+)?")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def text_of(page: Path) -> str:
    """Returns what is checked of a page: all of it, but of the changelog what is not yet released."""
    text = page.read_text(encoding="utf-8")
    return re.split(r"^## ", text, flags=re.MULTILINE)[1] if page.name == "CHANGELOG.md" else text


def named_paths(text: str) -> set[str]:
    """Returns what looks like a path of this repository: anywhere below a folder of it, and files in backticks."""
    paths = {path.rstrip(".") for path in _OURS.findall(text)}
    for words in _WORDS.findall(_FENCE.sub("", text)):
        whole = _LOCAL.fullmatch(words)
        if whole is not None and not words.startswith("."):
            paths.add(whole[1])
    return paths


def missing(text: str, page: Path) -> Iterator[str]:
    """Yields every path, module and link of a page that leads nowhere."""
    for path in named_paths(text) - OF_THE_READER:
        if not any(list(base.glob(path)) for base in (ROOT, ROOT / "mergekit_ot", page.parent)):
            yield path
    yield from (name for name in set(_MODULE.findall(text)) if not is_importable(name))
    yield from (link for link in _LINK.findall(_FENCE.sub("", text)) if not leads_somewhere(link, page, text))


def is_importable(name: str) -> bool:
    """Returns whether a dotted name is a module, or something in one."""
    module, _, attribute = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return bool(module) and is_importable(module) and hasattr(importlib.import_module(module), attribute)
    return True


def leads_somewhere(link: str, page: Path, text: str) -> bool:
    """Returns whether a link is to the net, or to a file that exists and a heading in it."""
    if re.match(r"[a-z]+:", link):
        return True
    place, _, anchor = link.partition("#")
    target = page.parent / place
    if not target.exists():
        return False
    return not anchor or anchor in anchors(target.read_text(encoding="utf-8") if place else text)


def anchors(text: str) -> set[str]:
    """Returns the anchors of a page's headings."""
    headings = _HEADING.findall(_FENCE.sub("", text))
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_paths_modules_and_links_of_a_page_exist(page: Path) -> None:
    assert sorted(missing(text_of(page), page)) == []


def test_the_pages_name_many_paths_and_links() -> None:
    texts = [text_of(page) for page in PAGES]
    assert sum(len(named_paths(text)) for text in texts) > 60
    assert sum(len(_LINK.findall(text)) for text in texts) > 100


def test_files_of_the_reader_are_named_somewhere() -> None:
    assert set().union(*(named_paths(text_of(page)) for page in PAGES)) >= OF_THE_READER


MADE_UP = """\
# A heading, `with code`

`tests/test_docs_paths.py` and `mergekit_ot/__init__.py` exist, so do `errors.py`, `plugins/mergeot_layers/`,
plugins/mergeot_*, `mergekit_ot.errors.MergeotError`, `mergekit_ot.testing`, [this](#a-heading-with-code),
[that](README.md#documentation) and [the net](https://example.org/nowhere). `path/to/file.py:make` is the reader's.

```bash
pytest tests/test_docs_paths.py
```
"""


def test_a_page_without_a_mistake_passes() -> None:
    assert list(missing(MADE_UP, ROOT / "PAGE.md")) == []


@pytest.mark.parametrize(
    ("mistake", "path"),
    [
        ("`mergekit_ot/no_such.py`", "mergekit_ot/no_such.py"),
        ("`no_such.py`", "no_such.py"),
        ("`no_such/folder/`", "no_such/folder/"),
        ("`no_such/errors.py:name`", "no_such/errors.py"),
        ("see plugins/no_such_*.", "plugins/no_such_*"),
        ("\n```bash\npytest tests/no_such.py\n```\n", "tests/no_such.py"),
        ("`mergekit_ot.no_such`", "mergekit_ot.no_such"),
        ("`mergekit_ot.errors.NoSuchError`", "mergekit_ot.errors.NoSuchError"),
        ("[a page](docs/no_such.md)", "docs/no_such.md"),
        ("[a page](no_such.md)", "no_such.md"),
        ("[a heading](#no-such)", "#no-such"),
        ("[a heading](README.md#no-such)", "README.md#no-such"),
    ],
)
def test_a_mistake_is_found(mistake: str, path: str) -> None:
    assert set(missing(MADE_UP + mistake, ROOT / "PAGE.md")) == {path}
