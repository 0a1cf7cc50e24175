"""What is said where no state in a file fits an architecture, or several do: what and where, why, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from mergekit_ot.errors import ArchitectureError
from mergekit_ot.storage.adapters import REASON, WAY_OUT, adapter_names
from mergekit_ot.storage.file_names import constants_among
from mergekit_ot.storage.fitting import Misfit
from mergekit_ot.storage.limits import shortened
from mergekit_ot.storage.record import Checkpoint
from mergekit_ot.storage.renaming import Renaming, are_places, behind_prefix

_SHOWN = 5
_LISTED = 8
_LOOKED_AT = 50


def ask_for_key(checkpoint: Checkpoint, keys: Iterable[str]) -> ArchitectureError:
    """Returns the error for several state dicts that fit."""
    named = [shortened(key) for key in keys]
    listed = ", ".join(f"'{key}'" if key else "the top level" for key in named[:_LISTED])
    return ArchitectureError(
        f"'{checkpoint.path}' holds {len(named)} state dicts that fit the architecture: {listed}. Say which one is "
        f"meant, such as --state-key {next(key for key in named if key)}."
    )


def ask_for_prefix(checkpoint: Checkpoint, arch: str, prefixes: Sequence[str]) -> ArchitectureError:
    """Returns the error for several copies of the network in one state dict."""
    named = [f"'{shortened(prefix)}'" if prefix else "no prefix" for prefix in prefixes]
    more = f" and {len(named) - _LISTED} more" if len(named) > _LISTED else ""
    example = next(prefix for prefix in prefixes if prefix)
    return ArchitectureError(
        f"'{checkpoint.path}' holds {len(named)} whole copies of architecture '{arch}', whose names begin with "
        f"{', '.join(named[:_LISTED])}{more}. Say which one is meant, such as --strip-prefix {shortened(example)}"
    )


def weights_besides(checkpoint: Checkpoint, arch: str, way: Renaming, names: Sequence[str]) -> ArchitectureError:
    """Returns the error for a network that fits and has unknown weights beside it."""
    looked_at = names[:_LOOKED_AT]  # to look at a tensor is to read it
    weights = [name for name in looked_at if constants_among(checkpoint.state, [name]) is None] or names
    fits = f" ({way.sentence})" if way.sentence else ""
    or_prefix = f", or take only what begins so with --strip-prefix {shortened(way.prefix)}" if way.prefix else ""
    return ArchitectureError(
        f"'{checkpoint.path}' has weights that are not in architecture '{arch}', which fits otherwise{fits}. Not in "
        f"the architecture: {_first(weights)}. If they are no part of the network, leave them as they are with "
        f"--ignore '{_pattern(weights[0])}'{or_prefix}; if they are, check --arch and its arguments."
    )


def misfit_error(
    checkpoint: Checkpoint, arch: str, difference: Misfit, prefix: str | None, renamed: str = ""
) -> ArchitectureError:
    """Returns the error for a state that does not fit.

    Args:
        checkpoint: What was read.
        arch: Name of the architecture.
        difference: How they differ.
        prefix: What the user asked to take off the names.
        renamed: What was done to the names.
    """
    factors = adapter_names(checkpoint.state.names) if difference.unexpected else []
    if factors:
        return ArchitectureError(
            f"'{checkpoint.path}' holds an adapter ('{shortened(factors[0])}' and {len(factors) - 1} more such "
            f"tensors): {REASON}. {WAY_OUT}"
        )
    if difference.unexpected and not difference.missing:
        return weights_besides(checkpoint, arch, Renaming(), difference.unexpected)
    done = f" ({renamed})" if renamed else ""
    return ArchitectureError(
        f"'{checkpoint.path}' does not fit architecture '{arch}'{done}{_difference(difference)} "
        f"{_advice(checkpoint, difference, prefix)}"
    )


def _advice(checkpoint: Checkpoint, difference: Misfit, prefix: str | None) -> str:
    names = checkpoint.state.names
    if are_places(names) and difference.missing:
        return (
            f"Its {len(names)} tensor(s) have no names: they are taken in the order of the architecture's state dict "
            "where it has as many. Check --arch and its arguments, or save the names too."
        )
    if prefix is not None and not behind_prefix(names, prefix):
        return f"No name in it begins with '{shortened(prefix)}': check --strip-prefix."
    if len(difference.unexpected) == len(names) and difference.missing:
        said = "No name in the file is one of the architecture: check --arch, and that the file holds this network."
        return said + folder_hint(checkpoint.path)
    return "Check --arch and its arguments." + folder_hint(checkpoint.path)


def folder_hint(path: Path) -> str:
    """Returns a sentence on the configuration that stands beside a file, where one does."""
    if path.is_dir() or not (path.parent / "config.json").is_file():
        return ""
    return f" Or name its folder, '{path.parent}', whose config.json says what the network is."


def _difference(difference: Misfit) -> str:
    shape = difference.reshaped
    if shape is not None:
        return f": '{shape.name}' is {shown(shape.held)} in the file and {shown(shape.expected)} in the architecture."
    if difference.retyped is not None:
        kind = str(difference.retyped.held).removeprefix("torch.")
        return f": '{difference.retyped.name}' holds {kind} in the file and floating-point weights in the architecture."
    sentences = [
        f" {what}: {_first(names)}."
        for what, names in (
            ("Missing in the file", difference.missing),
            ("Not in the architecture", difference.unexpected),
        )
        if names
    ]
    return "." + "".join(sentences)


def shown(shape: Sequence[int]) -> str:
    """Returns a shape as text."""
    return "×".join(map(str, shape)) or "a scalar"


def _pattern(name: str) -> str:
    """Returns a pattern for names like this one."""
    begin, point, _ = name.partition(".")
    return shortened(f"{begin}.*" if point else name)


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(shortened, names[:_SHOWN])) + more
