"""Files: whether they can be read, and texts that are written as a whole or not at all."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from mergekit_ot.errors import CheckpointError
from mergekit_ot.storage.adapters import REASON, WAY_OUT
from mergekit_ot.storage.limits import shortened
from mergekit_ot.storage.marks import with_mark
from mergekit_ot.storage.replacing import replacing


def write_text(path: Path, text: str, *, comment: str = "", overwrite: bool = False) -> None:
    r"""Writes a text file as a whole or not at all.

    Args:
        path: The file.
        text: What is written, as UTF-8.
        comment: How the format writes a comment, such as ``<!-- {} -->``: the last line then says that mergeot wrote
            the file, and it is replaced by the next run.
        overwrite: Whether a file that mergeot did not write may be replaced.

    Raises:
        CheckpointError: The file may not be written (`check_output`), or writing failed; an old one is as it was.

    Example:
        >>> import tempfile
        >>> page = Path(tempfile.mkdtemp()) / "page.md"
        >>> write_text(page, "# Results\n", comment="<!-- {} -->")
        >>> page.read_text()
        '# Results\n<!-- written by mergeot -->\n'
    """
    write_texts({path: with_mark(text, comment) if comment else text}, overwrite=overwrite)


def write_texts(texts: Mapping[Path, str], *, overwrite: bool = False) -> None:
    """Writes text files together: all are on the disk before the first is put in its place.

    Raises:
        CheckpointError: One may not be written, or writing failed; the old ones are as they were.
    """
    with contextlib.ExitStack() as stack:
        for path, text in texts.items():
            stack.enter_context(replacing(path, overwrite=overwrite)).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Makes a folder, with those above it, and removes it if the block fails before anything is in it.

    Raises:
        CheckpointError: It cannot be made.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"Cannot create the folder '{folder}': {error.strerror}. Choose another one.") from error
    try:
        yield
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def check_readable(path: Path) -> None:
    """Checks that `path` is there and can be read.

    Raises:
        CheckpointError: It is missing or not readable.
    """
    # Names that no file can have are those of none.
    if not os.path.exists(path):
        raise CheckpointError(missing_file(path))
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"'{path}' cannot be read: permission denied.")


def check_is_file(path: Path) -> None:
    """Checks that `path` is no folder.

    Raises:
        CheckpointError: It is one; the message lists what is in it, or says that it is an adapter.
    """
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.is_file())
        if "adapter_config.json" in files:
            raise CheckpointError(f"'{path}' holds an adapter: {REASON}. {WAY_OUT}")
        listing = f" It contains: {', '.join(files[:8])}." if files else ""
        raise CheckpointError(f"'{path}' is a folder, not a checkpoint.{listing} Name one file.")


def missing_file(path: Path, *, folders: bool = False) -> str:
    """Returns the sentence for a file that does not exist: did you mean its neighbour.

    Args:
        path: The file.
        folders: Whether a folder could be meant too.
    """
    folder = path.parent
    if not os.path.isdir(folder):
        return f"There is no file '{shortened(str(path), 300)}': the folder '{folder}' does not exist."
    if os.path.islink(path):
        return f"'{shortened(str(path), 300)}' is a link that leads to no file. Name the file itself, or mend the link."
    names = [file.name for file in folder.iterdir() if folders or file.is_file()]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    guess = f" Did you mean '{folder / close[0]}'?" if close else ""
    return f"There is no file {'or folder ' if folders else ''}'{shortened(str(path), 300)}'.{guess}"


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def size_of(path: Path) -> int:
    """Returns the bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) or path.stat().st_size


def folder_digest(folder: Path) -> str:
    """Returns the SHA-256 of the names and digests of all files in a folder.

    Example:
        >>> import tempfile
        >>> place = Path(tempfile.mkdtemp())
        >>> empty = folder_digest(place)
        >>> _ = (place / "notes.txt").write_text("mine")
        >>> folder_digest(place) == empty
        False
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file_digest(path)}  {path.relative_to(folder).as_posix()}\n".encode())
    return digest.hexdigest()


def plain(value: object) -> object:
    """Returns plain data in which numbers that JSON cannot hold (NaN, infinity) are None."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(inner) for inner in value]
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def json_text(value: object) -> str:
    """Returns plain data as the text of a JSON file."""
    return json.dumps(plain(value), indent=2) + "\n"
