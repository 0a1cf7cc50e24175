"""Options of solvers and repairs: what each may be, in words, and whether a value is that.

A method declares its options by annotations, such as ``Annotated[int, Ge(1)]`` or ``Literal["all", "first"]``; the
words of the messages and those of the documentation are made of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import operator
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, Union

import annotated_types

from mergekit_ot.errors import RecipeError

_BOUNDS: tuple[tuple[type, Callable[[Any], Any], str, Callable[[Any, Any], bool]], ...] = (
    (annotated_types.Ge, operator.attrgetter("ge"), "at least", operator.ge),
    (annotated_types.Gt, operator.attrgetter("gt"), "above", operator.gt),
    (annotated_types.Le, operator.attrgetter("le"), "at most", operator.le),
    (annotated_types.Lt, operator.attrgetter("lt"), "below", operator.lt),
)
# More steps, sweeps or starts than anyone waits for.
MOST_STEPS = 1_000_000

_UNIONS = (Union, types.UnionType)


def words_of(hint: Any) -> str:
    """Returns what a value of an annotation is, in words.

    Example:
        >>> words_of(Annotated[int, annotated_types.Ge(1)]), words_of(Literal["full", "half"])
        ('a whole number, at least 1', "'full' or 'half'")
    """
    if typing.get_origin(hint) is Annotated:
        return ", ".join([words_of(hint.__origin__), *(text for text, _ in _bounds(hint))])
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(each) for each in typing.get_args(hint))
    if typing.get_origin(hint) in _UNIONS:
        return " or ".join(words_of(each) for each in typing.get_args(hint))
    if hint in (object, Any):
        return "anything"
    known = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "none"}
    return known.get(hint) or f"a {hint.__name__ if isinstance(hint, type) else hint}"


def fits(hint: Any, value: object) -> bool:
    """Whether a value is what an annotation says; numbers are finite, and no text is a truth value.

    Example:
        >>> fits(bool, "false"), fits(int, 1.5), fits(float, float("nan")), fits(float, 2)
        (False, False, False, True)
    """
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return fits(hint.__origin__, value) and all(holds(value) for _, holds in _bounds(hint))
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in typing.get_args(hint))
    if origin in _UNIONS:
        return any(fits(each, value) for each in typing.get_args(hint))
    if hint is bool:
        # 0 and 1 are how a truth value may be written on the command line.
        return isinstance(value, bool) or (type(value) is int and value in (0, 1))
    if hint in (int, float):
        return _is_number(value, numbers.Integral if hint is int else numbers.Real)
    return _is_of_type(hint, value)


def read_number(hint: Any, value: object) -> object:
    """Returns the number that a text says, where a number is asked for; anything else as it is.

    YAML reads ``1e-3`` as a text.

    Example:
        >>> read_number(float, "1e-3"), read_number(int, "1.5"), read_number(bool, "1")
        (0.001, '1.5', '1')
    """
    plain = hint.__origin__ if typing.get_origin(hint) is Annotated else hint
    if isinstance(value, str) and plain in (int, float):
        try:
            return plain(value)
        except ValueError:
            return value
    return value


def option_hints(kind: type) -> Mapping[str, Any]:
    """Returns option → annotation of a class of methods, in the order of its fields.

    Example:
        >>> from mergekit_ot import default_manager
        >>> words_of(option_hints(default_manager().get("solver", "weight-matching"))["max_steps"])
        'a whole number, at least 1, at most 1000000'
    """
    hints = _hints(kind)
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    return {field.name: hints.get(field.name, object) for field in fields if field.init}


def check_option(who: str, option: str, hint: Any, value: object) -> None:
    """Checks one option of a method.

    Raises:
        RecipeError: The value is not what the option's annotation says.

    Example:
        >>> check_option("solver 'wb'", "max_steps", Annotated[int, annotated_types.Ge(1)], 1.5)
        Traceback (most recent call last):
        ...
        mergekit_ot.errors.RecipeError: Option max_steps of solver 'wb' is 1.5: a whole number, at least 1.
    """
    if not fits(hint, value):
        raise RecipeError(f"Option {option} of {who} is {value!r:.80}: {words_of(hint)}.")


def check_options(solver: Any, base: type) -> None:
    """Checks all options of a solver, and what the engine asks it as the base class says.

    Raises:
        RecipeError: One is not what its annotation says.
    """
    own, who = option_hints(type(solver)), f"solver '{solver.name}'"
    for field in dataclasses.fields(solver) if own else ():
        value = getattr(solver, field.name)
        # A default is what its author meant, even where the annotation is too narrow for it.
        if field.name in own and value is not field.default:
            check_option(who, field.name, own[field.name], value)
    for name, hint in _hints(base).items():
        if typing.get_origin(hint) is not typing.ClassVar:
            check_option(who, name, hint, getattr(solver, name))


@functools.cache
def _hints(kind: type) -> Mapping[str, Any]:
    try:
        return typing.get_type_hints(kind, include_extras=True)
    except (NameError, TypeError):
        # Names that are imported for type checkers only: what they mean cannot be known here.
        return {}


def _bounds(hint: Any) -> Iterator[tuple[str, Callable[[Any], bool]]]:
    """Yields the words of each bound of an annotation, and whether a value keeps it."""
    for entry in hint.__metadata__:
        for part in entry if isinstance(entry, annotated_types.GroupedMetadata) else (entry,):
            for kind, bound_of, word, holds in _BOUNDS:
                if isinstance(part, kind):
                    bound = bound_of(part)
                    yield f"{word} {bound}", functools.partial(_holds, holds, bound)


def _holds(holds: Callable[[Any, Any], bool], bound: Any, value: Any) -> bool:
    return holds(value, bound)


def _is_number(value: object, kind: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, kind):
        return False
    try:
        return math.isfinite(float(value))  # type: ignore[arg-type]
    except OverflowError:
        return kind is numbers.Integral


def _is_of_type(hint: Any, value: object) -> bool:
    if hint in (object, Any):
        return True
    if isinstance(hint, type) and typing.get_origin(hint) is None:
        return isinstance(value, hint)
    from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

    try:
        TypeAdapter(hint).validate_python(value, strict=False)
    except ValidationError:
        return False
    except PydanticSchemaGenerationError:
        return True
    return True
