"""Folders of files that are written as a whole or not at all, and of which nothing is lost that mergeot did not write.

A folder of ours holds a list of what was written into it: what was added or changed since then is the user's.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mergekit_ot.errors import CheckpointError
from mergekit_ot.storage.files import file_digest, json_text
from mergekit_ot.storage.marks import JSON_KEY
from mergekit_ot.storage.outputs import check_new_place, place_of, refusal
from mergekit_ot.storage.regular import read_bounded
from mergekit_ot.storage.replacing import folder_beside, reason, sync

MARK_FILE = "mergeot.json"
_FILES = "files"
_MOST_BYTES = 4 << 20
# Smaller files are compared with what was written; of larger ones, only the size is.
_COMPARED = 1 << 20
_OLD = ".mergeot-old"
_SHOWN = 3


def check_folder_output(path: Path, inputs: Iterable[str | Path] = (), *, overwrite: bool = False) -> None:
    """Checks that a folder of files can be written, and that nothing is lost by it.

    An empty folder is replaced, and one that mergeot wrote and in which nothing was added or changed since. With
    `overwrite`, what was changed is replaced too, but never a folder without our list or one in which more stands than
    we wrote. Links are followed; an input, or a folder with an input in it, is never replaced.

    Args:
        path: The folder.
        inputs: What is read.
        overwrite: Whether files that were changed since mergeot wrote them may be replaced.

    Raises:
        CheckpointError: Says what stands in the way, and what to do.

    Example:
        >>> folder = Path(tempfile.mkdtemp()) / "merged"
        >>> check_folder_output(folder)
        >>> folder.mkdir()
        >>> check_folder_output(folder)
        >>> _ = (folder / "notes.txt").write_text("mine")
        >>> check_folder_output(folder, overwrite=True)
        Traceback (most recent call last):
        ...
        mergekit_ot.errors.CheckpointError: '...merged' exists and was not written by mergeot. ...
    """
    try:
        target = place_of(path)
        check_new_place(path, target, inputs)
        if target.exists():
            _check_is_ours(path, target, overwrite)
    except (OSError, ValueError) as error:
        raise CheckpointError(refusal(path, error)) from error


def _check_is_ours(path: Path, target: Path, overwrite: bool) -> None:
    if not target.is_dir():
        raise CheckpointError(f"Cannot write the folder '{path}': a file is there. Choose another place.")
    if target.is_mount() or target.resolve() == Path.cwd():
        raise CheckpointError(f"The folder '{path}' is in use, so it is not replaced. Choose a new folder.")
    found = _found(target)
    if not found:
        return
    listed = _listed(target)
    if listed is None:
        raise CheckpointError(
            f"'{path}' exists and was not written by mergeot. Choose another place, or remove it yourself."
        )
    added = sorted(found - set(listed) - {MARK_FILE})
    if added:
        raise CheckpointError(
            f"'{path}' was written by mergeot, and more stands in it since then: {', '.join(added[:_SHOWN])}. "
            "Choose another place, or move that away first."
        )
    changed = [name for name in sorted(found & set(listed)) if not _is_same(target / name, listed[name])]
    if changed and not overwrite:
        raise CheckpointError(
            f"'{path}' was written by mergeot, and changed since then: {', '.join(changed[:_SHOWN])}. Choose another "
            "place, or replace it with --overwrite (overwrite: true in a recipe, overwrite=True in Python)."
        )


def _found(folder: Path) -> set[str]:
    """Returns the paths of everything in a folder that is no folder itself, and of empty folders."""
    names = set()
    for place, folders, files in os.walk(folder):
        here = Path(place)
        names |= {(here / name).relative_to(folder).as_posix() for name in files}
        # A link to a folder is not walked into, and an empty one may mean something to somebody.
        kept = [name for name in folders if (here / name).is_symlink() or not any((here / name).iterdir())]
        names |= {(here / name).relative_to(folder).as_posix() + "/" for name in kept}
    return names


def _listed(folder: Path) -> dict[str, list[Any]] | None:
    """Returns what mergeot wrote into a folder: path → size and digest; None where it does not say so."""
    place = folder / MARK_FILE
    if place.is_symlink() or not place.is_file():
        return None
    try:
        content = json.loads(read_bounded(place, _MOST_BYTES))
        files = content[_FILES] if str(content[JSON_KEY]).startswith("mergekit_ot ") else None
        return {str(name): list(written) for name, written in files.items()} if isinstance(files, dict) else None
    except (ValueError, KeyError, TypeError, RecursionError, CheckpointError):
        return None


def _is_same(path: Path, written: list[Any]) -> bool:
    return not path.is_symlink() and _facts(path) == written


def _facts(path: Path) -> list[Any]:
    size = path.stat().st_size
    return [size, file_digest(path)] if size <= _COMPARED else [size]


@contextlib.contextmanager
def replacing_folder(path: Path, metadata: Mapping[str, Any], *, overwrite: bool = False) -> Iterator[Path]:
    """Gives a new folder to write into, and puts it in its place if the block succeeds, with a list of its files.

    What stood there is first renamed and removed last, so that a run that is killed in between leaves both.

    Args:
        path: The folder.
        metadata: Plain data that is kept in the list.
        overwrite: See `check_folder_output`.

    Raises:
        CheckpointError: The folder may not be written, or writing failed; the old one is as it was.
    """
    check_folder_output(path, overwrite=overwrite)
    target = place_of(path)
    try:
        with folder_beside(target) as beside:
            new = beside / "folder"
            new.mkdir()
            try:
                yield new
                _write_list(new, metadata)
            except Exception as error:
                cause = reason(error, new / MARK_FILE)
                if cause is error:
                    raise
                raise cause from error
            _sync_all(new)
            _put(new, target)
            sync(target.parent)
    except OSError as error:
        raise CheckpointError(refusal(path, error)) from error


def _write_list(folder: Path, metadata: Mapping[str, Any]) -> None:
    from mergekit_ot import __version__

    files = {name: _facts(folder / name) for name in sorted(_found(folder))}
    content = {JSON_KEY: f"mergekit_ot {__version__}", **metadata, _FILES: files}
    (folder / MARK_FILE).write_text(json_text(content), encoding="utf-8")


def _sync_all(folder: Path) -> None:
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(place) / name)
        sync(Path(place))


def _put(new: Path, target: Path) -> None:
    """Renames a folder into its place; what stands there goes away only after that."""
    if not target.exists():
        os.rename(new, target)
        return
    mode = stat.S_IMODE(target.stat().st_mode)
    old = Path(tempfile.mkdtemp(_OLD, f"{target.name[:30]}.", target.parent))
    os.rename(target, old / target.name)
    try:
        new.chmod(mode)
        os.rename(new, target)
    except BaseException:
        os.rename(old / target.name, target)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)
