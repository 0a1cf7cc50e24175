"""Writing a file as a whole or not at all: in a folder of its own beside the place, then renamed into it.

The folder has a random name and is locked as long as its run lives, so that whoever writes there next finds out which
folders belong to runs that were killed, and removes them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mergekit_ot.errors import CheckpointError, MergeotError, causes_of
from mergekit_ot.storage.outputs import check_output, place_of, refusal

try:
    import fcntl
except ImportError:  # a system without these locks: what killed runs leave stays there
    fcntl = None

_SUFFIX = ".mergeot-part"
_PART = re.compile(r"\..*" + re.escape(_SUFFIX), re.DOTALL)
# Of the name of a file, this much shows in the name of its folder.
_SHOWN = 30
_ATTEMPTS = 100
_PROBE = bytes(1 << 20)

# The folders that this process writes in.
_unfinished: set[Path] = set()


@contextlib.contextmanager
def replacing(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives a path to write to, with the same name, and renames the file into place if the block succeeds.

    The new file has the mode of the one that it replaces. Only what is on the disk is renamed.

    Args:
        path: The file, or a link to it.
        overwrite: Whether a file that mergeot did not write may be replaced.

    Raises:
        CheckpointError: The file may not be written (`check_output`), or writing failed; the old one is as it was.
    """
    check_output(path, overwrite=overwrite)
    target = place_of(path)
    try:
        with folder_beside(target) as folder:
            beside = folder / path.name
            mode = _mode_of_new(beside)
            try:
                yield beside
            except Exception as error:
                cause = reason(error, beside)
                if cause is error:
                    raise
                raise cause from error
            _finish(beside, mode, target)
            os.replace(beside, target)
            sync(target.parent)
    except OSError as error:
        raise CheckpointError(refusal(path, error)) from error


def discard_unfinished() -> None:
    """Removes what this process has begun to write; for a process that ends at once."""
    for folder in list(_unfinished):
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """Gives a new folder beside a place, locked as long as the block runs, and removes it afterwards."""
    _remove_leftovers(target.parent)
    folder, lock = _locked_folder(target)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unfinished.discard(folder)
        if lock is not None:
            os.close(lock)


def _locked_folder(target: Path) -> tuple[Path, int | None]:
    shown = os.fsencode(target.name)[:_SHOWN].decode("utf-8", "ignore")
    for _ in range(_ATTEMPTS):
        folder = Path(tempfile.mkdtemp(_SUFFIX, f".{shown}.", target.parent))
        _unfinished.add(folder)
        try:
            return folder, _lock(folder)
        except (BlockingIOError, FileNotFoundError):
            # Before it was locked, another run took it for a left-over.
            _unfinished.discard(folder)
        except OSError:
            return folder, None
    raise OSError(errno.EAGAIN, f"other runs keep removing what is begun in '{target.parent}'")


def _lock(folder: Path) -> int:
    """Returns a descriptor that holds the lock of a folder as long as it is open.

    Raises:
        BlockingIOError: Another run has it.
        FileNotFoundError: The folder is gone.
        OSError: There are no locks here.
    """
    if fcntl is None:
        raise OSError(errno.ENOLCK, "no locks")
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(opened), os.lstat(folder)):
            raise FileNotFoundError(errno.ENOENT, "another folder has its name")
    except OSError:
        os.close(opened)
        raise
    return opened


def _remove_leftovers(parent: Path) -> None:
    """Removes the folders of runs of this user that were killed while they wrote into `parent`."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if _PART.fullmatch(entry.name) and entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                _remove_if_dead(Path(entry.path))


def _remove_if_dead(folder: Path) -> None:
    with contextlib.suppress(OSError):
        lock = _lock(folder)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _mode_of_new(beside: Path) -> int:
    """Returns the mode that a new file gets here: what the user's mask leaves."""
    opened = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return stat.S_IMODE(os.fstat(opened).st_mode)
    finally:
        os.close(opened)
        beside.unlink()


def _finish(beside: Path, mode: int, target: Path) -> None:
    """Gives the new file the mode, and where possible the owner, of the old one, and waits until it is on the disk."""
    with contextlib.suppress(FileNotFoundError):
        old = target.stat()
        mode = stat.S_IMODE(old.st_mode)
        with contextlib.suppress(OSError):
            os.chown(beside, old.st_uid, old.st_gid)
    beside.chmod(mode)
    sync(beside)


def sync(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    if path.is_dir() and os.name != "posix":
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def reason(error: Exception, beside: Path) -> BaseException:
    """Returns why writing failed: libraries that write by themselves hide an interrupt, or that a disk is full."""
    for cause in causes_of(error):
        if isinstance(cause, KeyboardInterrupt):
            return cause
    if isinstance(error, OSError | MergeotError):
        return error
    try:
        with beside.open("ab") as stream:
            stream.write(_PROBE)
    except OSError as full:
        return full
    return error
