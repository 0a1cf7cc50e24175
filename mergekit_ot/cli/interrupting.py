"""Ctrl-C and requests to end: one line, the status that shells know, nothing left behind, and within two seconds."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from mergekit_ot.storage.replacing import discard_unfinished

# So long may the work take to come to an end by itself: torch and solvers notice nothing before they are done.
_GRACE_SECONDS = 1.2
_WORDS = {"SIGINT": "interrupted", "SIGTERM": "ended by SIGTERM", "SIGHUP": "ended by SIGHUP"}
# The status of a process that a signal ended, as shells say it.
_BASE_STATUS = 128


class Stop:
    """Whether this process was asked to end, and by what; ends it if it does not end by itself."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._process = os.getpid()
        self._is_over = threading.Event()

    @property
    def status(self) -> int:
        """The exit status."""
        return _BASE_STATUS + (self.signal or 0)

    def tell(self) -> None:
        """Prints the line."""
        name = signal.Signals(self.signal or 0).name
        # On a terminal, what was typed stands on the line.
        before = "\n" if sys.stderr.isatty() else ""
        print(f"{before}mergeot: {_WORDS.get(name, f'ended by {name}')}.", file=sys.stderr, flush=True)

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Takes a signal: the work is interrupted where it is."""
        if os.getpid() != self._process:
            # A process that the user's data made: it ends as it would without us.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self.signal is not None:
            self._end_now(number)
        self.signal = number
        raise KeyboardInterrupt

    def watch(self, arrivals: int) -> None:
        """Waits in a thread of its own for a signal, and then that the work ends."""
        while True:
            number = os.read(arrivals, 1)
            if not number or self._is_over.is_set():
                return
            if number[0] in _numbers() and not self._is_over.wait(_GRACE_SECONDS):
                self._end_now(number[0])

    def end(self) -> None:
        """Says that the work is over."""
        self._is_over.set()

    def _end_now(self, number: int) -> NoReturn:
        self.signal = number
        discard_unfinished()
        with contextlib.suppress(Exception):
            self.tell()
        os._exit(self.status)


def _numbers() -> list[int]:
    """Returns the signals by which people and systems ask a process to end, where the system has them."""
    return [number for number in signal.Signals if number.name in _WORDS]


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
    """Takes care of signals while the block runs; those that are ignored stay ignored."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    arrivals, sending = os.pipe()
    os.set_blocking(sending, False)
    ours = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.signal(number, stop.ask) for number in _numbers() if signal.getsignal(number) in ours}
    woken = signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
    watcher = threading.Thread(target=stop.watch, args=(arrivals,), daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        stop.end()
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(sending, b"\0")
        watcher.join()
        os.close(sending)
        os.close(arrivals)
