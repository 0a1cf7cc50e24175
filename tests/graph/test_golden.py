"""Every test architecture: its groups are found, certified and preserved; what was counted by hand is all there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet
from architectures import HELD_OUT, LIBRARY, PLAIN, names, samples
from architectures.by_hand import COUNTED, FOUND_LESS

from mergekit_ot import check_model

_SPEC = importlib.util.spec_from_file_location("golden", Path(__file__).with_name("golden.py"))
golden = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(golden)
GOLDEN = golden.read()


def agrees(which: str, name: str) -> None:
    sample = samples(which)[name]
    report = check_model(sample.make, sample.inputs(), trials=1)
    assert golden.entry(which, name, report) == GOLDEN[which, name]
    assert report.preserved is True
    assert report.certified == report.groups > 0
    if which in PLAIN:
        assert (report.groups, report.families) == FOUND_LESS.get(name, (COUNTED[name],))[0]


# Takes as long as ten others.
LARGEST = ("mobilenet_v2",)


def shared_out(cases: list[tuple[str, str]], one_of: int) -> list[ParameterSet]:
    """Leaves one of so many to a default run, and the others and the largest to the slow one."""
    slow = [place for place, case in enumerate(cases) if place % one_of or case[1] in LARGEST]
    return [pytest.param(*case, marks=[pytest.mark.slow] if place in slow else []) for place, case in enumerate(cases)]


@pytest.mark.parametrize(("which", "name"), shared_out(names(*PLAIN), 3))
def test_plain_architecture(which: str, name: str) -> None:
    agrees(which, name)


@pytest.mark.parametrize(("which", "name"), shared_out(names(*LIBRARY), 6))
def test_architecture_of_transformers(which: str, name: str) -> None:
    pytest.importorskip("transformers")
    agrees(which, name)


@pytest.mark.slow
@pytest.mark.parametrize(("which", "name"), names(*HELD_OUT))
def test_held_out_architecture(which: str, name: str) -> None:
    pytest.importorskip("transformers")
    agrees(which, name)


def test_what_is_found_less_says_why_and_is_less() -> None:
    for name, (found, why) in FOUND_LESS.items():
        assert len(why) > 20
        assert found < COUNTED[name]
