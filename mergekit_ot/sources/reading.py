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
from mergekit_ot.sources.fits import Fit, fit
from mergekit_ot.sources.guesses import confirmed_architecture, guessed_architecture
from mergekit_ot.sources.misfits import shown
from mergekit_ot.sources.specs import Architecture, parse_spec, resolve_architecture
from mergekit_ot.storage.file_names import FileNames
from mergekit_ot.storage.file_options import FileOptions
from mergekit_ot.storage.finite import FiniteStore
from mergekit_ot.storage.record import Checkpoint

if TYPE_CHECKING:
    from mergekit_ot.hooks.manager import PluginManager
from mergekit_ot.progress import Notify

_AS_THEY_ARE = FileOptions()


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

    def of_file(self, state: Mapping[str, Tensor], *, is_renamed: bool = True) -> Mapping[str, Tensor]:
        """Returns a state of the architecture as the file has it: a tied tensor once, with the file's constants.

        Args:
            state: Name → tensor.
            is_renamed: Whether it goes into a file of the same kind, in which names have their prefix.
        """
        return self.names.of_file(state, self.checkpoint.state, is_renamed=is_renamed)

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
    files: FileOptions = _AS_THEY_ARE,
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
        files: Which weights in the files are meant.
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
        checkpoints.append(load_checkpoint(Path(path), manager, trust=is_trusted, state_key=files.state_key))
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
        fits = _fit(checkpoint, make, known, files, notify)
        for sentence in fits.names.sentences:
            notify(f"{checkpoint.path}: {sentence}")
        state = FiniteStore(fits.state, str(checkpoint.path))
        sources.append(ReadSource(fits.checkpoint, make, state, known, fits.names))
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
        return Architecture(checkpoint.architecture or f"the program in {checkpoint.path.name}", {}, checkpoint.build)
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


def _fit(source: Checkpoint, make: Architecture, known: KnownArchitecture, files: FileOptions, notify: Notify) -> Fit:
    try:
        _ = known.shapes
    except ArchitectureError as failure:
        if make.name != source.architecture:
            raise
        raise ArchitectureError(
            f"The architecture that '{source.path}' carries cannot be built. {failure}"
        ) from failure
    return fit(source, make.name, known, files, notify)


def check_target(make: Architecture, spec: str) -> None:
    """Checks that a target architecture has neurons everywhere.

    Raises:
        ArchitectureError: Names the first parameter without any.
    """
    for name, tensor in KnownArchitecture(make).shapes.items():
        if tensor.dim() and 0 in tensor.shape:
            raise ArchitectureError(
                f"Target '{spec}' has no neurons in '{name}' (shape {shown(tensor.shape)}): a fused layer needs at "
                "least one. Give a width of 1 or more."
            )
