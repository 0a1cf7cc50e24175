"""Sizes as a user writes them: ``64-64-10`` in a SPEC, a list in a checkpoint, a tuple in Python."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_ot.errors import ArchitectureError


def parse_sizes(sizes: str | int | Sequence[int], what: str, at_least: int) -> tuple[int, ...]:
    """Returns `sizes` as a tuple of positive integers.

    Args:
        sizes: A sequence, or a string such as ``64-64-10`` or ``64,64,10``.
        what: The argument's name, for the message.
        at_least: How many are needed.

    Raises:
        ArchitectureError: Something in it is not a positive integer, or there are too few.
    """
    given: Sequence[object]
    if isinstance(sizes, str):
        given = sizes.replace(",", "-").split("-")
    elif isinstance(sizes, int):
        given = [sizes]
    else:
        given = list(sizes)
    numbers = [positive(part, what) for part in given]
    if len(numbers) < at_least:
        raise ArchitectureError(
            f"{what}={sizes!r} has {len(numbers)} sizes; at least {at_least} are needed. {_form(what)}"
        )
    return tuple(numbers)


def positive(value: object, what: str) -> int:
    """Returns `value` as a positive integer.

    Raises:
        ArchitectureError: It is none.
    """
    text = str(value).strip()
    number = int(text) if text.isdecimal() and not isinstance(value, bool) else 0
    if number < 1:
        raise ArchitectureError(f"{what}: {value!r} is not a number of at least one. {_form(what)}")
    return number


def _form(what: str) -> str:
    return f"Write positive integers, such as {what}=64-64-10 where several are taken."
