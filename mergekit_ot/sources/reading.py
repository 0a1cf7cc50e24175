"""From file names to source models: read, checked against their architectures, with an input to trace them by."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mergekit_ot.api import load_checkpoint
from mergekit_ot.errors import ArchitectureError, RecipeError
from mergekit_ot.fusion.architecture import KnownArchitecture
from mergekit_ot.sources.bare import check_alike, holder_of
from mergekit_ot.sources.guesses import confirmed_architecture, guessed_architecture
from mergekit_ot.sources.specs import Architecture, parse_spec, resolve_architecture
from mergekit_ot.storage.file_names import FileNames, constants_among
from mergekit_ot.storage.finite import FiniteStore
from mergekit_ot.storage.fitting import FittedStore, Misfit, misfit
from mergekit_ot.storage.limits import shortened
from mergekit_ot.storage.record import Checkpoint

if TYPE_CHECKING:
    from mergekit_ot.hooks.manager import PluginManager
from mergekit_ot.progress import Notify


@dataclass(frozen=True)
class ReadSource:
    """A checkpoint together with the architecture that it fits.

    Attributes:
        checkpoint: What was read.
        make: Builds fresh instances of its architecture.
        state: The checkpoint's state in the architecture's order, completed by counters that its file lacks; a tensor
            that is not finite is refused when it is first read.
        known: The architecture with its names and shapes, one object for all sources that have it.
        names: How the file's names differ from those of the architecture.
    """

    checkpoint: Checkpoint
    make: Architecture
    state: FiniteStore
    known: KnownArchitecture
    names: FileNames

    @property
    def name(self) -> str:
        """The file name, as the user gave it."""
        return str(self.checkpoint.path)

    def of_file(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns a state of the architecture as the file has it: a tied tensor once, with the file's constants."""
        return self.names.of_file(state, self.checkpoint.state)

    def module(self) -> nn.Module:
        """Returns a fresh module that holds the state."""
        module = self.make()
        module.load_state_dict(dict(self.state), strict=False)  # names and shapes were checked when it was read
        return module


def read_sources(
    paths: Sequence[str],
    arch: Sequence[str],
    manager: PluginManager,
    notify: Notify,
    trust: Sequence[str] = (),
    *,
    as_they_stand: bool = False,
) -> list[ReadSource]:
    """Opens checkpoints, in order, and checks every name and shape against the architectures before any work.

    No tensor is read for it; one that holds NaN or infinity is refused when it is read.

    Args:
        paths: The checkpoints.
        arch: No SPEC (each file carries its own), one for all, or one per checkpoint.
        manager: Whose formats and architectures are known.
        notify: Told what was found.
        trust: Those of the checkpoints whose programs may be loaded.
        as_they_stand: Whether tensors are only averaged, which needs no architecture where names and shapes are equal.

    Raises:
        CheckpointError: A file cannot be read.
        ArchitectureError: No architecture is known for it, or the state does not fit.
        RecipeError: The number of architectures fits neither, or a file that is trusted is no checkpoint.
    """
    if len(arch) not in (0, 1, len(paths)):
        raise RecipeError(
            f"{len(arch)} architectures for {len(paths)} checkpoints: give --arch once for all, or once each."
        )
    trusted = _trusted_places(paths, trust)
    checkpoints = []
    for path in paths:
        is_trusted = os.path.realpath(path) in trusted
        checkpoints.append(load_checkpoint(Path(path), manager, trust=is_trusted))
        notify(f"{path}: {checkpoints[-1].found}")
        if is_trusted and checkpoints[-1].build is None:
            notify(f"{path} holds no program: that it is trusted changes nothing.")
    sources: list[ReadSource] = []
    holder = None
    if as_they_stand and not arch and not all(map(_says_its_architecture, checkpoints)):
        check_alike(checkpoints)
        holder = holder_of(max(checkpoints, key=lambda checkpoint: len(checkpoint.state)))
        notify("No file need say what its architecture is: tensors of equal names are averaged as they stand.")
    for index, checkpoint in enumerate(checkpoints):
        spec = arch[index if len(arch) > 1 else 0] if arch else None
        make = holder or _architecture_of(checkpoint, spec, manager, notify)
        # One object per architecture: it is then traced once for all its checkpoints.
        twin = next((other for other in sources if other.make == make), None)
        make, known = (make, KnownArchitecture(make)) if twin is None else (twin.make, twin.known)
        state, names = fitted(checkpoint, make, known)
        for sentence in names.sentences:
            notify(f"{checkpoint.path}: {sentence}")
        sources.append(ReadSource(checkpoint, make, FiniteStore(state, str(checkpoint.path)), known, names))
    return sources


def _trusted_places(paths: Sequence[str], trust: Sequence[str]) -> set[str]:
    # Unlike Path.resolve, this bears links in a circle, which are refused where they are read.
    known = {os.path.realpath(path) for path in paths}
    for name in trust:
        if os.path.realpath(name) not in known:
            raise RecipeError(
                f"'{name}' is to be trusted, and is none of the checkpoints that are read: {', '.join(paths)}. "
                "Give --trust the name of one of them."
            )
    return {os.path.realpath(name) for name in trust}


def _says_its_architecture(checkpoint: Checkpoint) -> bool:
    # A program that is not trusted is refused in words of its own.
    return any((checkpoint.build, checkpoint.architecture, checkpoint.has_untouched_program))


def _architecture_of(checkpoint: Checkpoint, spec: str | None, manager: PluginManager, notify: Notify) -> Architecture:
    if spec is not None:
        parsed = parse_spec(spec)
        if parsed.name is None and parsed.place in manager.guesses:
            return confirmed_architecture(parsed, checkpoint, manager)
        return resolve_architecture(spec, manager)
    if checkpoint.build is not None:
        return Architecture(f"the program in {checkpoint.path.name}", {}, checkpoint.build)
    if checkpoint.has_untouched_program:
        raise ArchitectureError(
            f"'{checkpoint.path}' holds a program, and loading a program can run code of whoever made the file: pass "
            f"--trust {checkpoint.path} if you trust them, or --arch SPEC to take only the weights from it."
        )
    if checkpoint.architecture is None:
        make, sentence = guessed_architecture(checkpoint, manager)
        notify(sentence)
        return make
    # Only registered names: a file must not be able to name code.
    if checkpoint.architecture not in manager.architectures:
        known = ", ".join(sorted(manager.architectures)) or "none"
        raise ArchitectureError(
            f"'{checkpoint.path}' carries the architecture '{checkpoint.architecture}', which no installed plugin "
            f"registers (known: {known}). Install its plugin, or pass --arch SPEC."
        )
    return resolve_architecture(checkpoint.architecture, manager, checkpoint.arguments)


def fitted(checkpoint: Checkpoint, make: Architecture, known: KnownArchitecture) -> tuple[FittedStore, FileNames]:
    """Returns the state in the architecture's order and how the file's names differ, after checking that they agree.

    A tensor that the architecture has under several names may stand in the file under one of them. Where nothing is
    missing, constants that the architecture does not have are left out: masks, positions, counters.

    Raises:
        ArchitectureError: Names the tensors that are missing or unexpected, or the first shape that differs.
    """
    try:
        expected = known.shapes
    except ArchitectureError as failure:
        if make.name != checkpoint.architecture:
            raise
        raise ArchitectureError(
            f"The architecture that '{checkpoint.path}' carries cannot be built. {failure}"
        ) from failure
    store = checkpoint.state
    difference, constants = misfit(store, expected, known.ties), {}
    if difference is not None and difference.unexpected and not difference.missing:
        constants = constants_among(store, difference.unexpected) or {}
        difference = misfit(store, expected, known.ties, constants)
    if difference is not None:
        raise ArchitectureError(
            f"'{checkpoint.path}' does not fit architecture '{make.name}'{_difference_text(difference)} "
            "Check --arch and its arguments."
        )
    state = FittedStore(store, expected, known.ties)
    return state, FileNames(state.filled, constants)


def _difference_text(difference: Misfit) -> str:
    shape = difference.reshaped
    if shape is not None:
        return f": '{shape.name}' is {_shape(shape.held)} in the file and {_shape(shape.expected)} in the architecture."
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


def check_target(make: Architecture, spec: str) -> None:
    """Checks that a target architecture has neurons everywhere.

    Raises:
        ArchitectureError: Names the first parameter without any.
    """
    for name, tensor in KnownArchitecture(make).shapes.items():
        if tensor.dim() and 0 in tensor.shape:
            raise ArchitectureError(
                f"Target '{spec}' has no neurons in '{name}' (shape {_shape(tensor.shape)}): a fused layer needs at "
                "least one. Give a width of 1 or more."
            )


def _first(names: Sequence[str]) -> str:
    return ", ".join(map(shortened, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "a scalar"
