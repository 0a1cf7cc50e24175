"""Pages have sentences of at most thirty words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Written by programs, or tables of what was measured.
WRITTEN = ("docs/explanation/results.md", "docs/reference/api.md", "docs/reference/recipe-keys.md")
PARTS = ("tutorials", "how-to", "reference", "explanation")
FOUND = [page.relative_to(ROOT).as_posix() for part in PARTS for page in sorted((ROOT / "docs" / part).glob("*.md"))]
PAGES = ["README.md", "docs/index.md", *(page for page in FOUND if page not in WRITTEN)]
MOST_WORDS = 30
_NO_PROSE = re.compile(r"^```.*?^```$|^(?:\||#|!\[|<!--|:::)[^\n]*$", re.MULTILINE | re.DOTALL)


def sentences(text: str) -> list[str]:
    """Returns the sentences of a page: no code, tables, pictures or targets of links; list items stand alone."""
    text = _NO_PROSE.sub("\n", text)
    text = re.sub(r"\]\([^)]+\)", "]", text)
    paragraphs = re.split(r"\n\s*\n|\n(?=- |\d\. )", text)
    parts = (re.split(r"(?<=[.!?])\*{0,2}\s+", " ".join(paragraph.split())) for paragraph in paragraphs)
    return [sentence for part in parts for sentence in part if sentence]


@pytest.mark.parametrize("page", PAGES)
def test_no_sentence_is_longer(page: str) -> None:
    found = sentences((ROOT / page).read_text(encoding="utf-8"))
    assert len(found) > 3
    assert [sentence for sentence in found if len(sentence.split()) > MOST_WORDS] == []


def test_a_long_sentence_is_found() -> None:
    long = " ".join(["word"] * 31) + "."
    text = f"# A heading of a page\n\nShort. {long}\n\n```bash\n{long}\n```\n| {long} |\n- {long}\n"
    assert [len(sentence.split()) for sentence in sentences(text)] == [1, 31, 32]
