"""What may be written where: decided in this place for everything that mergeot writes, before any work is done."""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from mergekit_ot.errors import CheckpointError, RecipeError
from mergekit_ot.storage.marks import is_ours

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}
_NO_ROOM = "Make room there, or choose another place."
_NOT_ALLOWED = "Choose a folder that you may write to."
_ADVICE = {
    errno.ENOSPC: _NO_ROOM,
    errno.EDQUOT: _NO_ROOM,
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f), or choose another place.",
    errno.EACCES: _NOT_ALLOWED,
    errno.EPERM: _NOT_ALLOWED,
    errno.EROFS: _NOT_ALLOWED,
    errno.ENAMETOOLONG: "Give a shorter name.",
}
_LONGEST_PART = "." * 60
_SHOWN = 200


def check_output(path: str | Path, inputs: Iterable[str | Path] = (), *, overwrite: bool = False) -> None:
    """Checks that a file can be written, and that nothing is lost by it.

    A link is followed: what it points to is replaced. What exists and is no regular file is never replaced, nor is an
    input; a file that mergeot did not write is replaced with `overwrite` only, unless it is empty.

    Args:
        path: The file.
        inputs: What is read; a folder stands for all that is in it.
        overwrite: Whether a file that mergeot did not write may be replaced.

    Raises:
        CheckpointError: Says what stands in the way, and what to do.

    Example:
        >>> import tempfile
        >>> notes = Path(tempfile.mkdtemp()) / "notes.txt"
        >>> check_output(notes)
        >>> _ = notes.write_text("mine")
        >>> check_output(notes, overwrite=True)
        >>> check_output(notes)
        Traceback (most recent call last):
        ...
        mergekit_ot.errors.CheckpointError: '...' exists and was not written by mergeot. ... with --overwrite ...
    """
    path = Path(path)
    try:
        target = place_of(path)
        found = _status(target)
        if found is not None and not stat.S_ISREG(found.st_mode):
            raise CheckpointError(_no_file(path, found.st_mode))
        _check_place(path, target)
        _check_no_input(path, target, inputs)
        if found is not None:
            _check_replaceable(path, target, overwrite or found.st_size == 0)
    except (OSError, ValueError) as error:
        raise CheckpointError(refusal(path, error)) from error


def check_new_place(path: Path, target: Path, inputs: Iterable[str | Path]) -> None:
    """Checks the folder in which something is written, and that it is no input, nor within one or around one.

    Args:
        path: Where it is written, as the user gave it.
        target: Where a link leads that stands there.
        inputs: What is read.

    Raises:
        CheckpointError: Says what stands in the way.
    """
    inputs = list(inputs)
    _check_place(path, target)
    _check_no_input(path, target, inputs)
    for name in inputs:
        if os.path.isdir(target) and Path(name).resolve().is_relative_to(target.resolve()):
            raise CheckpointError(
                f"The input '{name}' stands in the output '{path}': it would be lost. Choose another place."
            )


def check_outputs(
    outputs: Mapping[str, Path | None], inputs: Iterable[str | Path] = (), *, overwrite: bool = False
) -> None:
    """Checks files that are written together: each of them, and that no two are the same.

    Args:
        outputs: What says where → the file; None for what is not asked for.
        inputs: What is read.
        overwrite: Whether files that mergeot did not write may be replaced.

    Raises:
        CheckpointError: One cannot be written.
        RecipeError: Two are the same.
    """
    asked = {name: path for name, path in outputs.items() if path is not None}
    inputs = list(inputs)
    for path in asked.values():
        check_output(path, inputs, overwrite=overwrite)
    for (name, path), (other_name, other) in itertools.combinations(asked.items(), 2):
        if is_same(path, other):
            raise RecipeError(f"{name} and {other_name} are both '{other}': give each a file of its own.")


def check_folder(folder: Path) -> None:
    """Checks that `folder` exists and can be written, or can be made in an existing one.

    Raises:
        CheckpointError: It is a file, or it or its parent cannot be written.
    """
    try:
        found = _status(folder)
        if found is None:
            if folder.is_symlink():
                raise CheckpointError(f"'{folder}' is a link to a folder that does not exist. Choose another name.")
            _check_place(folder, folder)
        elif not stat.S_ISDIR(found.st_mode):
            raise CheckpointError(f"'{folder}' is a file; a folder is needed there. Choose another name.")
        else:
            _check_allowed(folder, folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(refusal(folder, error)) from error


def place_of(path: Path) -> Path:
    """Returns where a file is written: at `path`, or where the link leads that stands there.

    Raises:
        CheckpointError: The link leads nowhere.
    """
    if not path.is_symlink():
        return path
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"Cannot write '{path}': it is a link to '{os.readlink(path)}', and no file is there. Remove the link, or "
            "name the file itself."
        ) from error


def is_same(path: Path, other: Path) -> bool:
    """Returns whether two names are one file, through links, or would be."""
    try:
        return path.resolve() == other.resolve() or os.path.samestat(path.stat(), other.stat())
    except (OSError, ValueError, RuntimeError):
        return False


def refusal(path: Path, error: OSError | ValueError) -> str:
    """Returns the sentence for a file that cannot be written: why, and what to do."""
    if not isinstance(error, OSError):
        return f"Cannot write {str(path)[:_SHOWN]!r}: no file can have this name ({error}). Choose another."
    advice = _ADVICE.get(error.errno or 0, "Choose another place.")
    name = str(path) if len(str(path)) <= _SHOWN else f"{str(path)[:_SHOWN]}…"
    return f"Cannot write '{name}': {error.strerror or error}. {advice}"


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _no_file(path: Path, mode: int) -> str:
    kind = _KINDS.get(stat.S_IFMT(mode), "no file")
    advice = "Give the name of a file in it." if stat.S_ISDIR(mode) else "Only files are replaced. Name a file."
    return f"Cannot write '{path}': it is {kind}. {advice}"


def _check_place(path: Path, target: Path) -> None:
    folder = target.parent
    found = _status(folder)
    if found is None:
        raise CheckpointError(f"Cannot write '{path}': the folder '{folder}' does not exist. Create it first.")
    if not stat.S_ISDIR(found.st_mode):
        raise CheckpointError(f"Cannot write '{path}': '{folder}' is a file, not a folder. Choose another place.")
    _check_allowed(path, folder)
    # It is written in a folder of its own beside its place, whose path is longer.
    _status(folder / _LONGEST_PART / path.name)


def _check_allowed(path: Path, folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CheckpointError(f"Cannot write '{path}': the folder '{folder}' is not writable. {_NOT_ALLOWED}")


def _check_no_input(path: Path, target: Path, inputs: Iterable[str | Path]) -> None:
    for name in inputs:
        source = Path(name)
        if is_same(source, target):
            raise CheckpointError(f"The output '{path}' is the input '{name}': it would be lost. Choose another place.")
        if os.path.isdir(source) and target.resolve().is_relative_to(source.resolve()):
            raise CheckpointError(
                f"The output '{path}' stands in the input '{name}', which is read as a whole. Choose another place."
            )


def _check_replaceable(path: Path, target: Path, overwrite: bool) -> None:
    if not os.access(target, os.W_OK):
        raise CheckpointError(
            f"'{path}' is protected against writing, so it is not replaced. Choose another place, or allow it: "
            f"chmod u+w '{path}'."
        )
    if not overwrite and not (os.access(target, os.R_OK) and is_ours(target)):
        raise CheckpointError(
            f"'{path}' exists and was not written by mergeot. Choose another place, or replace it with --overwrite "
            "(overwrite: true in a recipe, overwrite=True in Python)."
        )
