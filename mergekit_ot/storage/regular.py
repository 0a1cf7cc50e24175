"""Regular files: opened only if they are some, mapped into memory, and read no further than they reach."""

from __future__ import annotations

import io
import math
import mmap
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, final

import torch
from torch import Tensor

from mergekit_ot.errors import CheckpointError, MergeotError

_KINDS = (
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)


def check_regular(path: Path, error: type[MergeotError] = CheckpointError) -> None:
    """Checks that a path leads to a file or a folder, and not to a device, a pipe or a socket, which may never end.

    Raises:
        MergeotError: It does not, or cannot be followed.
    """
    try:
        _check_mode(path, path.stat().st_mode, error)
    except (OSError, ValueError) as failure:
        raise error(f"'{path}' cannot be read: {reason(failure)}.") from failure


def _check_mode(path: Path, mode: int, error: type[MergeotError]) -> None:
    kind = next((name for test, name in _KINDS if test(mode)), None)
    if kind is not None:
        raise error(f"'{path}' leads to {kind}, not to a file. Name a regular file.")


def reason(failure: Exception) -> str:
    """Returns why the system refused a file, in a few words."""
    text = failure.strerror if isinstance(failure, OSError) else str(failure)
    return (text or type(failure).__name__).lower().rstrip(".")


def open_regular(path: Path, error: type[MergeotError] = CheckpointError) -> io.BufferedReader:
    """Opens a regular file for reading; one that is swapped for a pipe in that moment does not block.

    Raises:
        MergeotError: It is no regular file, or cannot be read.
    """
    check_regular(path, error)
    try:
        stream = open(path, "rb", opener=_opened_without_waiting)  # noqa: SIM115 - the caller closes it
    except (OSError, ValueError) as failure:
        raise error(f"'{path}' cannot be read: {reason(failure)}.") from failure
    mode = os.fstat(stream.fileno()).st_mode
    if not stat.S_ISREG(mode):
        stream.close()
        _check_mode(path, mode, error)
        raise error(f"'{path}' is not a regular file.")
    return stream


def _opened_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK if os.name == "posix" else flags)


def read_bounded(path: Path, most: int, error: type[MergeotError] = CheckpointError) -> bytes:
    """Returns the first bytes of a regular file, `most` at most.

    Raises:
        MergeotError: It is no regular file, or cannot be read.
    """
    with open_regular(path, error) as stream:
        try:
            return stream.read(most)
        except OSError as failure:
            raise error(f"'{path}' cannot be read: {reason(failure)}.") from failure


@final
class MappedFile:
    r"""A regular file mapped into memory: its bytes, and tensors over them, are read when they are looked at.

    Whoever writes into such a tensor changes a copy in memory, never the file.

    Args:
        path: The file.

    Raises:
        CheckpointError: It is a device, a pipe, a socket or a folder, it is empty, or it cannot be read.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "raw"
        >>> _ = path.write_bytes(bytes([0, 1, 2, 3, 4, 5]))
        >>> with MappedFile(path) as file:
        ...     file.size, file.read(1, 2), file.tensor(torch.uint8, (2, 2), 2)
        (6, b'\x01\x02', tensor([[2, 3], [4, 5]], dtype=torch.uint8))
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as stream:
            if not os.fstat(stream.fileno()).st_size:
                raise CheckpointError(
                    f"'{path}' is empty: it was truncated while it was written or copied. Copy it again."
                )
            try:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError, OverflowError) as failure:
                raise CheckpointError(f"'{path}' cannot be mapped into memory: {reason(failure)}.") from failure
        self.size = len(self._map)

    def read(self, start: int, count: int) -> bytes:
        """Returns `count` bytes from `start` on; fewer where the file ends."""
        return self._map[start : start + count]

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], start: int) -> Tensor:
        """Returns the tensor whose entries stand in the file from `start` on, row by row.

        Raises:
            CheckpointError: The file ends before the tensor does.
        """
        count = math.prod(shape)
        if not count:
            return torch.zeros(tuple(shape), dtype=dtype)
        if start < 0 or start + count * dtype.itemsize > self.size:
            raise CheckpointError(f"'{self.path}' is truncated: it ends before its tensors do. Copy it again.")
        if start % dtype.itemsize:
            # Processors may refuse numbers that do not stand at a multiple of their size.
            copied = bytearray(self.read(start, count * dtype.itemsize))
            return torch.frombuffer(copied, dtype=dtype).reshape(tuple(shape))
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start).reshape(tuple(shape))

    def close(self) -> None:
        """Lets go of the file; tensors over it stay whole."""
        # What is exported to tensors cannot be unmapped; it goes with the last of them.
        del self._map
        self._map = mmap.mmap(-1, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
