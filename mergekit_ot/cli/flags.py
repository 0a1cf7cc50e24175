"""Flags made of the fields of `FusionOptions` and of those on files: a new choice is a flag without a line here."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer
from annotated_types import Ge

from mergekit_ot.cli.options import installed_plugins, parse_options, parse_weights
from mergekit_ot.fusion.options import FusionOptions, option_fields
from mergekit_ot.scoring.data_options import DataOptions
from mergekit_ot.storage.file_options import FileOptions, WritingOptions

Command = Callable[..., None]
_CHOSEN = "chosen"
_MAPPINGS = {"solver_options", "repair_options"}
# Options whose values shells complete, and what they are for the plugin manager.
_COMPLETED = {
    "solver": "solver",
    "repair": "repair",
    "measure": "measure",
    "executor": "executor",
    "front_end": "front end",
}
_REPEATED = {"ignore", "inputs", "metrics"}


def takes_options(command: str, **defaults: object) -> Callable[[Command], Command]:
    """Gives a command the flags of the options that name it; it gets their values as ``chosen``, by name.

    Args:
        command: Name of the command.
        **defaults: Values where a flag is not given, for options that this command sets itself.
    """
    flags = [_flag(FusionOptions, field.name, defaults.get(field.name)) for field in option_fields(command)]
    for record in (DataOptions, FileOptions, WritingOptions):
        fields = dataclasses.fields(record)
        flags += [_flag(record, field.name, None) for field in fields if command in field.metadata["commands"]]

    def decorate(function: Command) -> Command:
        own = inspect.signature(function, eval_str=True).parameters
        place = list(own).index(_CHOSEN)
        before, after = list(own.values())[:place], list(own.values())[place + 1 :]

        @functools.wraps(function)
        def run(**values: Any) -> None:
            chosen = {flag.name: values.pop(flag.name) for flag in flags}
            for name in _MAPPINGS & chosen.keys():
                chosen[name] = parse_options(chosen[name], _spelled(name))
            for name in _REPEATED & chosen.keys():
                chosen[name] = tuple(chosen[name] or ())
            function(**values, **{_CHOSEN: chosen})

        parameters = [*before, *flags, *after]
        # Typer reads a command from its signature and its annotations, not from the function that is wrapped.
        del run.__wrapped__  # type: ignore[attr-defined]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _flag(record: type[Any], name: str, default: object) -> inspect.Parameter:
    metadata = record.__dataclass_fields__[name].metadata
    settings: dict[str, Any] = {"metavar": metadata["metavar"], "help": metadata["help"]}
    if name in _COMPLETED:
        settings["autocompletion"] = names_of(_COMPLETED[name])
    hint = typing.get_type_hints(record, include_extras=True)[name]
    kind, least = _plain(hint)
    flag = metadata.get("flag") or _spelled(name)
    if least is not None:
        settings["min"] = least
    if kind is dict or (kind is tuple and str in typing.get_args(hint)):
        kind = list[str]
    elif kind is tuple:
        kind, settings["parser"] = Any, parse_weights
    annotation = Annotated[kind if kind is Any else kind | None, typer.Option(flag, **settings)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def names_of(kind: str) -> Callable[[str], list[str]]:
    """Returns what completes the name of something registered.

    Args:
        kind: As the plugin manager calls it.
    """

    def complete(incomplete: str) -> list[str]:
        return [name for name in sorted(installed_plugins().table(kind)) if name.startswith(incomplete)]

    return complete


def _spelled(name: str) -> str:
    # An option that is repeated is a mapping of options.
    return "--" + name.removesuffix("s" if name in _MAPPINGS else "").replace("_", "-")


def _plain(hint: Any) -> tuple[Any, Any]:
    """Returns the plain type of an annotation, and the least value that it allows."""
    if typing.get_origin(hint) is Annotated:
        bounds = [bound.ge for bound in hint.__metadata__ if isinstance(bound, Ge)]
        return hint.__origin__, next(iter(bounds), None)
    inner = [argument for argument in typing.get_args(hint) if argument is not type(None)]
    if type(None) in typing.get_args(hint):
        return _plain(inner[0])
    return typing.get_origin(hint) or hint, None
