"""A stream for torch to write archives to: what goes wrong is told after the archive is closed.

The writer of torch ends the whole process where a write fails, or is interrupted, and the archive is then closed.
"""

from __future__ import annotations

import contextlib
import io
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, cast, final

from typing_extensions import override


@final
class _PatientStream(io.RawIOBase):
    """Writes until something goes wrong, and keeps what that was."""

    def __init__(self, stream: io.FileIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    @override
    def writable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._stream.seek(offset, whence)

    @override
    def write(self, content: Any, /) -> int:
        left = memoryview(content).cast("B")
        size = len(left)
        try:
            while self.failure is None and left:
                left = left[self._stream.write(left) :]
        except OSError as error:
            self.failure = error
        return size


@contextlib.contextmanager
def torch_stream(path: str | Path) -> Iterator[BinaryIO]:
    """Gives a stream to a new file for ``torch.save`` or ``torch.export.save``; errors are raised at the end.

    Meanwhile Ctrl-C waits, and the names in the archive do not depend on the path.

    Args:
        path: The file.

    Raises:
        OSError: The file could not be written.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "net.pt"
        >>> with torch_stream(path) as stream:
        ...     torch.save({"weight": torch.ones(2)}, stream)
        >>> torch.load(path)["weight"]
        tensor([1., 1.])
    """
    with Path(path).open("wb", buffering=0) as opened:
        patient = _PatientStream(opened)
        with _uninterrupted():
            yield cast("BinaryIO", patient)
        if patient.failure is not None:
            raise patient.failure


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Lets signals that Python handles wait until the block is over."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[tuple[int, FrameType | None]] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    deferred = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in deferred:
        signal.signal(number, lambda which, frame: waiting.append((which, frame)))
    try:
        yield
    finally:
        for number, handler in deferred.items():
            signal.signal(number, handler)
        for which, frame in waiting[:1]:
            deferred[signal.Signals(which)](which, frame)
