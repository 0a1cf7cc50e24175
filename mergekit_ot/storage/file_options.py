"""What a user may say about the files: which weights in them are meant, and how the result is written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

# The container of the source whose sizes the result takes.
AS_SOURCE, STATE_DICT, OWN = "source", "state-dict", "mergeot"
FORMATS = (AS_SOURCE, STATE_DICT, OWN)

_READING = ("fuse", "align", "check", "inspect", "eval", "barrier")
_WRITING = ("fuse", "align")


def _said(default: Any, help_text: str, metavar: str, commands: tuple[str, ...]) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text, "metavar": metavar, "commands": commands})


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """Which weights in the files are meant, where a file holds more than one network needs; for all files alike.

    Attributes:
        state_key: The key of the state dict in the file, such as ``params_ema``; None takes the likeliest.
        strip_prefix: What stands before the names in the file, such as ``model.``; None looks for it.
        ignore: Patterns of names that are no weights of the network, such as ``total_*``; they stay as they are.
    """

    state_key: str | None = _said(None, "Which state dict in the files is meant, such as params_ema.", "KEY", _READING)
    strip_prefix: str | None = _said(
        None, "What to take off the names in the files, such as model. (else it is looked for).", "PREFIX", _READING
    )
    ignore: tuple[str, ...] = _said(
        (), "Names in the files that are no weights of the network, such as 'total_*'; repeatable.", "GLOB", _READING
    )


@dataclass(frozen=True, kw_only=True)
class WritingOptions:
    """How the result is written.

    Attributes:
        format: ``source`` as the source whose sizes it takes, ``state-dict`` as a bare state dict of torch, or
            ``mergeot`` as a file of mergeot's own, which carries its architecture.
    """

    format: str = _said(
        AS_SOURCE,
        "Container of the result: that of the source whose sizes it takes, or another. Default: source.",
        "source|state-dict|mergeot",
        _WRITING,
    )
