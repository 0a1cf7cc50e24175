"""Writing files safely: beside the place first, then renamed into it."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from mergekit_ot.errors import CheckpointError
from mergekit_ot.storage.limits import shortened


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path beside `path`, with the same extension, and renames it into place if the block succeeds.

    Raises:
        CheckpointError: The folder does not exist, or nothing can be written there.
    """
    check_writable(path)
    beside = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:
        raise CheckpointError(f"Cannot write '{path}': {error.strerror or error}. Choose another place.") from error
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file as a whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def check_writable(path: Path) -> None:
    """Checks that a file can be written to `path`.

    Raises:
        CheckpointError: The folder does not exist, `path` is a folder, or writing is not allowed.
    """
    if path.is_dir():
        raise CheckpointError(f"Cannot write '{path}': it is a folder. Give the name of a file in it.")
    if not path.parent.is_dir():
        raise CheckpointError(f"Cannot write '{path}': the folder '{path.parent}' does not exist. Create it first.")
    if not os.access(path.parent, os.W_OK):
        raise CheckpointError(f"Cannot write '{path}': the folder '{path.parent}' is not writable.")


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
        CheckpointError: It is one; the message lists what is in it.
    """
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.is_file())
        listing = f" It contains: {', '.join(files[:8])}." if files else ""
        raise CheckpointError(f"'{path}' is a folder, not a checkpoint.{listing} Name one file.")


def missing_file(path: Path) -> str:
    """Returns the sentence for a file that does not exist: did you mean its neighbour."""
    folder = path.parent
    if not os.path.isdir(folder):
        return f"There is no file '{shortened(str(path), 300)}': the folder '{folder}' does not exist."
    names = [file.name for file in folder.iterdir() if file.is_file()]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    guess = f" Did you mean '{folder / close[0]}'?" if close else ""
    return f"There is no file '{shortened(str(path), 300)}'.{guess}"


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def plain(value: object) -> object:
    """Returns plain data in which numbers that JSON cannot hold (NaN, infinity) are None."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(inner) for inner in value]
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def write_json(path: Path, value: object) -> None:
    """Writes plain data as JSON, as a whole or not at all."""
    write_text(path, json.dumps(plain(value), indent=2) + "\n")
