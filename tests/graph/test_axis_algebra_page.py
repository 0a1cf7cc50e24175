"""The page docs/explanation/axis-algebra.md: its code runs and prints what it says, its pictures are up to date."""

from __future__ import annotations

import doctest
import importlib.util
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "explanation" / "axis-algebra.md"
_SPEC = importlib.util.spec_from_file_location("pictures", DOCS / "examples" / "axis_algebra_pictures.py")
drawing = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(drawing)
PICTURES = drawing.pictures()


def test_the_code_of_the_page_prints_what_stands_there() -> None:
    outcome = doctest.testfile(str(PAGE), module_relative=False, verbose=False)
    assert outcome.attempted > 25
    assert outcome.failed == 0


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_what_the_script_draws(name: str) -> None:
    assert (DOCS / "pictures" / name).read_text(encoding="utf-8") == PICTURES[name]


def test_the_page_shows_every_picture_and_no_other() -> None:
    shown = re.findall(r"!\[[^]]+\]\(\.\./pictures/([^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(PICTURES)


def test_the_page_and_the_pictures_write_the_same_labels() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, picture in PICTURES.items():
        titles = [element.text for element in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")]
        labels = [title.split(":  ")[1] for title in titles if ":  " in title]
        assert labels
        if name != "axes-expressions.svg":
            assert all(f"'{label}'" in page for label in labels)


def test_every_neuron_of_a_label_is_drawn_once() -> None:
    # Squares have a thin dark line; 24 rows and 8 columns in each picture of the worked example.
    for name, picture in PICTURES.items():
        if name != "axes-expressions.svg":
            assert picture.count("stroke:#333333") == 24 + 8
