"""Options of solvers: what a value may be follows from annotations, wherever the value comes from."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import typer
from annotated_types import Ge, Gt, Interval, Lt
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ot import (
    AbstractBarycenterSolver,
    BarycenterProblem,
    Permutation,
    PluginManager,
    RecipeError,
    Scope,
    hookimpl,
)
from mergekit_ot.cli.options import parse_options
from mergekit_ot.hooks.methods import build_solver, checked_solver
from mergekit_ot.transport.options import fits, read_number, words_of

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("hint", "words", "good", "bad"),
    [
        (bool, "true or false", [True, False, 0, 1], ["false", "true", 2, 1.0, None, []]),
        (int, "a whole number", [3, -1, 10**400, np.int64(2)], [1.5, 1.0, "3", True, None, NAN]),
        (float, "a number", [1.5, 2, np.float32(0.5), Fraction(1, 2)], [NAN, INF, -INF, "1", True, None, 10**400, 1j]),
        (Annotated[int, Ge(1)], "a whole number, at least 1", [1, 2], [0, -1, 1.5, True]),
        (Annotated[float, Gt(0), Lt(1)], "a number, above 0, below 1", [0.5], [0, 1, NAN, -0.5]),
        (Annotated[int, Interval(ge=0, le=3)], "a whole number, at least 0, at most 3", [0, 3], [-1, 4]),
        (Literal["all", "first"], "'all' or 'first'", ["all"], ["last", 3, None, True]),
        (Literal[1, 2], "1 or 2", [1], [True, 1.0, "1"]),
        (str, "a text", ["x", ""], [3, None, b"x"]),
        (int | None, "a whole number or none", [None, 3], ["x", 1.5]),
        (tuple[int, ...], "a tuple[int, ...]", [(1, 2), ()], ["x", 3, (1, "x")]),
        (Scope, "a Scope", [Scope.INCIDENT], ["incident"]),
        (object, "anything", [1, "x", None], []),
        (Any, "anything", [1, "x", None], []),
    ],
)
def test_a_value_is_what_its_annotation_says(hint: Any, words: str, good: list[Any], bad: list[Any]) -> None:
    assert words_of(hint) == words
    assert all(fits(hint, value) for value in good)
    assert not any(fits(hint, value) for value in bad)


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(10**12), 10**12))
def test_a_number_may_be_written_as_a_text(number: float, whole: int) -> None:
    assert read_number(float, str(number)) == number
    assert read_number(Annotated[int, Ge(0)], str(whole)) == whole
    assert read_number(bool, "1") == "1"
    assert read_number(int, "1.5") == "1.5"


@dataclass(frozen=True)
class Theirs(AbstractBarycenterSolver):
    """A solver of another package; its own check does not call the one of the base class."""

    name = "theirs"

    share: Annotated[float, Gt(0)] = 0.5
    radius: float = INF
    members: str = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_sweeps", 2)

    def find(self, problem: BarycenterProblem) -> tuple[Permutation, ...]:
        return tuple(Permutation.identity(problem.size) for _ in problem.measures)


def manager() -> PluginManager:
    found = PluginManager.load()
    found.register(SimpleNamespace(mergeot_solvers=hookimpl(lambda: {"theirs": Theirs})), "theirs")
    return found


def test_a_solver_of_another_package_is_held_to_its_annotations() -> None:
    assert build_solver("theirs", {"share": "1e-3"}, manager()) == Theirs(share=0.001)
    for options, message in (
        ({"share": 0}, "Option share of solver 'theirs' is 0: a number, above 0."),
        ({"share": "half"}, "Option share of solver 'theirs' is 'half': a number, above 0."),
        ({"radius": INF}, "Option radius of solver 'theirs' is inf: a number."),
        ({"name": "x"}, "Unknown option of solver 'theirs' 'name'. Known: members, radius, share."),
    ):
        with pytest.raises(RecipeError) as raised:
            build_solver("theirs", options, manager())
        assert str(raised.value) == message


def test_a_solver_that_does_not_check_itself_is_checked() -> None:
    assert checked_solver(Theirs()) == Theirs()
    for made, message in (
        (Theirs(share=NAN), "Option share of solver 'theirs' is nan: a number, above 0."),
        (Theirs(members="last"), "Option members of solver 'theirs' is 'last': 'all' or 'first'."),
    ):
        with pytest.raises(RecipeError) as raised:
            checked_solver(made)
        assert str(raised.value) == message


@pytest.mark.parametrize("again", ["epsilon=2", "epsilon=1"])
def test_an_option_given_twice_is_refused(again: str) -> None:
    with pytest.raises(typer.BadParameter, match="'epsilon' is given twice"):
        parse_options(["epsilon=1", again])
    with pytest.raises(typer.BadParameter, match="'max_steps' is given twice"):
        parse_options(["max-steps=1", "max_steps=2"])


def test_truth_values_on_the_command_line() -> None:
    given = parse_options(["keep_apart=yes", "signs=No", "outgoing=false", "members=all", "starts=2"])
    assert given == {"keep_apart": True, "signs": False, "outgoing": False, "members": "all", "starts": 2}
