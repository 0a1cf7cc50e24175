"""The options that several commands share, and how their text is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mergekit_ot.hooks.manager import PluginManager

_TRUTHS = {"yes": True, "no": False}
_SPEC = "package.module:name, path/file.py:name or a registered name, with ?key=value&key=value"


def installed_plugins() -> PluginManager:
    """Returns the manager of the installed plugins."""
    from mergekit_ot.hooks.manager import default_manager

    return default_manager()


def _numbers(text: str, kind: type, what: str) -> tuple[Any, ...]:
    try:
        return tuple(kind(number) for number in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"'{text}' is not {what}") from error


def parse_shape(text: str) -> tuple[int, ...]:
    """Reads ``1,28,28``.

    Raises:
        BadParameter: It is not a list of whole numbers above zero.
    """
    shape = _numbers(text, int, "a shape such as 1,28,28")
    if any(size < 1 for size in shape):
        raise typer.BadParameter(f"'{text}' is not a shape: every size is at least 1")
    return shape


def parse_weights(text: str) -> tuple[float, ...]:
    """Reads ``0.5,0.5``.

    Raises:
        BadParameter: It is not a list of numbers.
    """
    return _numbers(text, float, "a list of model weights such as 0.5,0.5")


def parse_options(options: Sequence[str] | None, flag: str = "--solver-option") -> dict[str, Any]:
    """Reads the ``key=value`` pairs that a flag gives.

    Raises:
        BadParameter: One has no equals sign, or a key stands twice.
    """
    from mergekit_ot.sources.specs import parse_value

    found: dict[str, Any] = {}
    for option in options or ():
        key, equals, value = option.partition("=")
        name = key.replace("-", "_")
        if not (key and equals):
            raise typer.BadParameter(f"'{key}' is not key=value", param_hint=flag)
        if name in found:
            raise typer.BadParameter(f"'{key}' is given twice", param_hint=flag)
        found[name] = _TRUTHS[value.lower()] if value.lower() in _TRUTHS else parse_value(value)
    return found


def parse_target(text: str | None) -> int | str | None:
    """Reads the place of a source, or leaves a SPEC as it is."""
    return int(text) if text is not None and text.lstrip("-").isdigit() else text


Arch = Annotated[
    list[str] | None,
    typer.Option("--arch", metavar="SPEC", help=f"Architecture ({_SPEC}); once for all checkpoints, or once each."),
]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        "--trust", metavar="FILE", help="A checkpoint whose program (.pt2) may run: you trust who made it; repeatable."
    ),
]
Shape = Annotated[
    Any,
    typer.Option(
        "--input-shape", metavar="1,28,28", parser=parse_shape, help="Shape of one input, without the batch axis."
    ),
]
Data = Annotated[
    str | None,
    typer.Option("--data", metavar="SPEC", help="Data: an .npz, or a callable that gives (inputs, targets) batches."),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target", metavar="INDEX|SPEC", help="Whose sizes the fused model takes: a place from 0. Default: 0."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else.")]
Overwrite = Annotated[
    bool | None, typer.Option("--overwrite", help="Also replace files that mergeot did not write; never an input.")
]
Models = Annotated[list[str], typer.Argument(metavar="CKPT…", show_default=False, help="Checkpoints.")]
Model = Annotated[str, typer.Argument(metavar="CKPT", show_default=False, help="A checkpoint.")]
