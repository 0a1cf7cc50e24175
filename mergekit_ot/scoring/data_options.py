"""What a user may say about inputs and data, whatever is done with them: each a flag, and a key of recipes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

_EVERYWHERE = ("fuse", "align", "check", "inspect", "eval", "barrier")
_TRACED = ("fuse", "align", "check", "inspect", "barrier")


def _said(default: Any, help_text: str, metavar: str, commands: tuple[str, ...], flag: str | None = None) -> Any:
    metadata = {"help": help_text, "metavar": metavar, "commands": commands, "flag": flag}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What the inputs are, and which entries of a batch are meant.

    Attributes:
        inputs: One description per input, ``NAME=1,28,28`` or ``NAME=int:1000``, in place of a shape or data.
        input_key: Entries of a batch that are the inputs, in order, with commas between: keys, or places from 0.
        label_key: The entry of a batch that is the targets.
    """

    inputs: tuple[str, ...] = _said(
        (),
        "One input without any data: 'x=1,8,8', 't=int:1000' (whole numbers below 1000); repeatable.",
        "NAME=SHAPE",
        _TRACED,
        "--input",
    )
    input_key: str | None = _said(
        None, "Which entries of a batch are the inputs, such as image.", "KEY[,KEY]", _EVERYWHERE
    )
    label_key: str | None = _said(None, "Which entry of a batch is the targets, such as label.", "KEY", _EVERYWHERE)
