"""Sizes as a user writes them: in a SPEC query, in a file's metadata, or in Python."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_ot import ArchitectureError

Sizes = str | int | Sequence[int]


def read_sizes(given: Sizes, name: str, at_least: int = 1) -> tuple[int, ...]:
    """Returns sizes as a tuple of positive integers.

    Args:
        given: ``"16-32"``, one integer, or a sequence of integers.
        name: What the sizes are called, for the message.
        at_least: How many there have to be.

    Raises:
        ArchitectureError: They are no positive integers, or too few.

    Example:
        >>> read_sizes("784-400-10", "sizes"), read_sizes([16, 32], "channels"), read_sizes(16, "channels")
        ((784, 400, 10), (16, 32), (16,))
    """
    parts = given.split("-") if isinstance(given, str) else given if isinstance(given, Sequence) else (given,)
    try:
        sizes = tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        sizes = ()
    if len(sizes) < at_least or min(sizes, default=0) < 1:
        raise ArchitectureError(
            f"{name}={given!r} is not a list of at least {at_least} positive integers. "
            f"Write them with hyphens, {name}=64-32-10, or as a sequence."
        )
    return sizes
