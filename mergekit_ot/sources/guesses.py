"""Architectures that no file names: guessed from the names and shapes of what stands in it, and said to be guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from mergekit_ot.errors import ArchitectureError, PluginError, blaming
from mergekit_ot.sources.misfits import folder_hint
from mergekit_ot.sources.specs import Architecture, Spec

if TYPE_CHECKING:
    from torch import nn

    from mergekit_ot.hooks.manager import PluginManager
    from mergekit_ot.storage.record import Checkpoint

# What can be done where nothing is known, the likeliest first.
_WAYS_OUT = (
    "Pass --arch SPEC: the class or function that builds the network, such as --arch nets.py:mlp, a registered name "
    "('mergeot plugins'), or timm:NAME or torchvision:NAME. A .pt2 file holds its program (--trust), and a plain "
    "average needs no architecture (--solver average). See 'mergeot docs architectures'."
)
# Compared before a whole tensor is.
_FIRST_ROWS = 2


@dataclass(frozen=True)
class Guess:
    """An architecture that was guessed from the names and shapes of a file.

    Attributes:
        build: Builds a module whose state dict has exactly those names and shapes; called with `arguments`.
        arguments: Plain data, equal where the guesses are.
        sentence: What was guessed, in words: "a chain of 2 linear layers 4-8-2".
        unknown: What of the function is in no file and was made up ("the activation between the layers"); empty where
            the user has said all of it.

    Example:
        >>> from torch import nn
        >>> guess = Guess(nn.Linear, {"in_features": 3, "out_features": 2}, "one linear layer 3-2")
        >>> guess.build_module()
        Linear(in_features=3, out_features=2, bias=True)
    """

    build: Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    sentence: str = ""
    unknown: str = ""

    def build_module(self) -> nn.Module:
        """Returns a fresh module."""
        return self.build(**self.arguments)


def guessed_architecture(checkpoint: Checkpoint, manager: PluginManager) -> tuple[Architecture, str]:
    """Returns the one architecture that the names and shapes of a file allow, and a sentence that says so.

    Raises:
        ArchitectureError: There is none or more than one, with the reasons and all that can be done.
    """
    found: dict[str, Guess] = {}
    reasons: list[str] = []
    for name in manager.guesses:
        try:
            found[name] = _asked(checkpoint, name, {}, manager, is_confirmed=False)
        except ArchitectureError as refusal:
            reasons.append(str(refusal))
    if len(found) == 1:
        ((name, guess),) = found.items()
        missing = f" Not in the file: {guess.unknown}." if guess.unknown else ""
        said = (
            f"{checkpoint.path}: guessed from names and shapes: {guess.sentence}.{missing} If it is something else, "
            "pass --arch SPEC."
        )
        return _architecture(f"a guessed {name}", guess), said
    if found:
        reasons = [f"It may be {' or '.join(guess.sentence for guess in found.values())}."]
    why = f", and cannot be guessed. {' '.join(reasons)}" if reasons else "."
    hint = folder_hint(checkpoint.path)
    raise ArchitectureError(f"'{checkpoint.path}' does not say what its architecture is{why} {_WAYS_OUT}{hint}")


def confirmed_architecture(spec: Spec, checkpoint: Checkpoint, manager: PluginManager) -> Architecture:
    """Returns the architecture that a user says a file has, by the name of a guess and perhaps arguments.

    Raises:
        ArchitectureError: The names and shapes of the file are none of its kind.
    """
    try:
        return _architecture(spec.text, _asked(checkpoint, spec.place, spec.arguments, manager, is_confirmed=True))
    except ArchitectureError as refusal:
        raise ArchitectureError(f"'{checkpoint.path}' is no {spec.place}. {refusal}") from refusal


def _asked(
    checkpoint: Checkpoint, name: str, arguments: dict[str, Any], manager: PluginManager, *, is_confirmed: bool
) -> Guess:
    shapes = {each: tuple(checkpoint.state.shape(each)) for each in checkpoint.state.names}
    entry = manager.guesses[name]
    guesser = entry.load()
    with blaming(guesser, f"Guess '{name}' of plugin '{entry.plugin}'"):
        guess = guesser(shapes, is_confirmed=is_confirmed, arguments=arguments)
    if not isinstance(guess, Guess):
        raise PluginError(
            f"Guess '{name}' of plugin '{entry.plugin}' returned a {type(guess).__name__}, and not a Guess. Leave the "
            "plugin out with MERGEOT_PLUGINS."
        )
    _check_nothing_is_tied(checkpoint)
    return guess


def _check_nothing_is_tied(checkpoint: Checkpoint) -> None:
    """Checks that no matrix stands in a file twice: one that two layers share has to stay one.

    Raises:
        ArchitectureError: Names two that are equal.
    """
    state, seen = checkpoint.state, {}
    for name in state.names:
        shape = tuple(state.shape(name))
        for other in seen.setdefault(shape, []) if len(shape) > 1 else ():
            parts = (state.slice(each, 0, _FIRST_ROWS) for each in (name, other))
            if torch.equal(*parts) and torch.equal(state.read(name), state.read(other)):
                raise ArchitectureError(
                    f"'{other}' and '{name}' hold the same numbers: they may be one weight that two layers share."
                )
        seen[shape] = [*seen.get(shape, []), name]


def _architecture(name: str, guess: Guess) -> Architecture:
    # Equal guesses make equal architectures, so that one trace serves all files that are alike.
    return Architecture(name, {}, guess.build_module, unknown=guess.unknown)


def check_function_is_known(sources: Iterable[tuple[str, Architecture]], doing: str) -> None:
    """Checks that what networks compute is known, before they are run to see it.

    Args:
        sources: File and architecture of each.
        doing: What needs it, as the subject of a sentence: "--repair refit".

    Raises:
        ArchitectureError: One was guessed.
    """
    for name, architecture in sources:
        if architecture.unknown:
            raise ArchitectureError(
                f"{doing} runs the networks, and what '{name}' computes was only guessed (not in the file: "
                f"{architecture.unknown}). Pass --arch SPEC: the class or function that builds the network. See "
                "'mergeot docs architectures'."
            )
