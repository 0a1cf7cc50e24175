"""The page docs/explanation/transformers.md: its pictures are what the script draws, and are all shown."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "explanation" / "transformers.md"
_SPEC = importlib.util.spec_from_file_location("pictures", DOCS / "examples" / "transformer_pictures.py")
drawing = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(drawing)
PICTURES = drawing.pictures()
# Curves that `mergeot barrier --plot` drew of the networks in the table.
CURVES = {"barrier-gpt.svg", "barrier-llama.svg"}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_what_the_script_draws(name: str) -> None:
    assert (DOCS / "pictures" / name).read_text(encoding="utf-8") == PICTURES[name]


def test_the_page_shows_every_picture_and_no_other() -> None:
    shown = re.findall(r"!\[[^]]+\]\(\.\./pictures/([^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert sorted(shown) == sorted({*PICTURES, *CURVES})


@pytest.mark.parametrize("name", PICTURES)
def test_everything_drawn_lies_on_the_picture(name: str) -> None:
    root = ElementTree.fromstring(PICTURES[name])
    width, height = float(root.get("width")), float(root.get("height"))
    boxes = [element for element in root.iter("{http://www.w3.org/2000/svg}rect") if "%" not in element.get("width")]
    assert len(boxes) > 10
    for element in boxes:
        left, top, wide, high = (float(element.get(name)) for name in ("x", "y", "width", "height"))
        assert left >= 0
        assert top >= 0
        assert left + wide <= width
        assert top + high <= height
