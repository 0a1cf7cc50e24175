"""Limits on what a file may ask for: each has a name, a default, and an environment variable that raises it.

A file is small and what it asks for may be huge: zeros that unfold, tensors that repeat one number, names of a
megabyte. What a file asks for is compared with a limit before it is granted.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import final

from mergekit_ot.errors import CheckpointError, MergeotError, RecipeError

_SHOWN = 80
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


@final
@dataclass(frozen=True)
class Limit:
    """The most that a file may ask for of one thing.

    Attributes:
        variable: The environment variable that sets another value.
        default: The value where it is not set.
        unit: What is counted, in the plural; ``bytes`` are shown as MiB and the like.

    Example:
        >>> limit = Limit("MERGEOT_MAX_PAGES", 3, "pages")
        >>> limit.check(2, "'book.txt' has")
        >>> limit.check(4, "'book.txt' has")
        Traceback (most recent call last):
        mergekit_ot.errors.CheckpointError: 'book.txt' has 4 pages, more than the limit of 3 pages. If you trust ...
    """

    variable: str
    default: int
    unit: str = "bytes"

    @property
    def value(self) -> int:
        """The limit that holds now.

        Raises:
            RecipeError: The environment variable is no whole number above zero.
        """
        text = os.environ.get(self.variable, "").strip()
        if not text:
            return self.default
        if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text) > 0):
            raise RecipeError(
                f"The environment variable {self.variable} is '{shortened(text)}': give a whole number of {self.unit}."
            )
        return int(text)

    def check(self, asked: int, what: str, error: type[MergeotError] = CheckpointError) -> None:
        """Checks that what is asked for is not too much.

        Args:
            asked: How much is asked for.
            what: Who asks, with the verb: the message goes on with the number.
            error: What is raised.

        Raises:
            MergeotError: It is more than the limit.
        """
        if asked > self.value:
            # Rounded up where it would look equal, so that the number helps.
            raise error(
                f"{what} {self.shown(asked)}, more than the limit of {self.shown(self.value)}. "
                f"If you trust the file, raise the limit: {self.variable}={min(asked, 10**18 - 1)}."
            )

    def shown(self, count: int) -> str:
        """Returns a number of what is counted, for messages."""
        if self.unit != "bytes":
            return f"{count if count < 10**18 else f'{float(min(count, 10**300)):.0e}'} {self.unit}"
        size, place = count, 0
        while size >= 1024 and place < len(_UNITS) - 1:
            size, place = size / 1024, place + 1
        return f"{count} bytes" if place == 0 else f"{min(size, 1e9):.4g} {_UNITS[place]}"


# What stands in docs/reference/command-line.md, in this order.
PICKLE_BYTES = Limit("MERGEOT_MAX_PICKLE_BYTES", 64 << 20)
PICKLE_STEPS = Limit("MERGEOT_MAX_PICKLE_STEPS", 2_000_000, "steps")
HEADER_BYTES = Limit("MERGEOT_MAX_HEADER_BYTES", 16 << 20)
UNFOLDED_BYTES = Limit("MERGEOT_MAX_UNFOLDED_BYTES", 256 << 20)
NAME_LENGTH = Limit("MERGEOT_MAX_NAME_LENGTH", 1000, "characters")
INPUT_NUMBERS = Limit("MERGEOT_MAX_INPUT_NUMBERS", 1 << 24, "numbers")
RECIPE_BYTES = Limit("MERGEOT_MAX_RECIPE_BYTES", 64 << 10)
RECIPE_VALUES = Limit("MERGEOT_MAX_RECIPE_VALUES", 10_000, "values")
RECIPE_DEPTH = Limit("MERGEOT_MAX_RECIPE_DEPTH", 20, "levels")
ALL = (PICKLE_BYTES, PICKLE_STEPS, HEADER_BYTES, UNFOLDED_BYTES, NAME_LENGTH, INPUT_NUMBERS)
ALL += (RECIPE_BYTES, RECIPE_VALUES, RECIPE_DEPTH)

# No file asks for it: what the networks may take that are run to compare aligned sources with the sources.
CHECK_BYTES = Limit("MERGEOT_MAX_CHECK_BYTES", 16 << 30)

# Data that unfolds so many times is common: images are mostly dark.
UNSUSPICIOUS_FOLDING = 32


def check_unfolded(size: int, stored: int, what: str, error: type[MergeotError] = CheckpointError) -> None:
    """Checks what a few bytes of a file become: up to 32 times as many are fine, more only within the limit.

    Args:
        size: Bytes that it becomes.
        stored: Bytes that stand in the file for it.
        what: What unfolds, with the verb.
        error: What is raised.

    Raises:
        MergeotError: It is more than the limit.
    """
    if size > UNSUSPICIOUS_FOLDING * stored:
        UNFOLDED_BYTES.check(size, what, error)


def check_tensor_name(name: object, where: str) -> None:
    """Checks that a tensor has a name that can be shown.

    Args:
        name: The name.
        where: Whose it is, for the message.

    Raises:
        CheckpointError: It is no text, or longer than the limit.

    Example:
        >>> check_tensor_name(7, "'net.pt'")
        Traceback (most recent call last):
        mergekit_ot.errors.CheckpointError: 'net.pt' has a tensor under the int 7: names are text.
    """
    if not isinstance(name, str):
        raise CheckpointError(
            f"{where} has a tensor under the {type(name).__name__} {shortened(name)}: names are text."
        )
    NAME_LENGTH.check(len(name), f"{where} has a tensor '{shortened(name)}' whose name is of")


def shortened(value: object, length: int = _SHOWN) -> str:
    """Returns a value as text of a bounded length, for messages."""
    if isinstance(value, int) and abs(value) > 10**length:
        return f"a number of more than {length} digits"
    if isinstance(value, list | tuple | dict | set):
        return f"a {type(value).__name__} of {len(value)}"
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= length else f"{text[:length]}…"
