"""Commands in processes of their own that are forked from this one, so that none of them imports torch anew."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

from mergekit_ot.cli.app import main

_UNFORESEEN = 99


class Forked:
    """A command that runs; it ends on its own, or is killed."""

    def __init__(self, process: int, errors: int) -> None:
        self.process, self._errors = process, errors
        self.text = ""

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal."""
        os.kill(self.process, number)

    def end(self, limit: float = 120.0) -> int:
        """Waits at most so long, and returns the status, negative where a signal ended it; ``text`` is what it said.

        Raises:
            TimeoutError: It was not over; it is then.
        """
        until, state = time.monotonic() + limit, None
        while state is None and time.monotonic() < until:
            process, found = os.waitpid(self.process, os.WNOHANG)
            state = found if process else None
            time.sleep(0 if process else 0.005)
        if state is None:
            self.kill()
            os.waitpid(self.process, 0)
        with os.fdopen(self._errors, errors="replace") as stream:
            self.text = stream.read()
        if state is None:
            raise TimeoutError(f"not over after {limit} s: {self.text}")
        return os.waitstatus_to_exitcode(state)


def forked(arguments: Sequence[str], prepare: Callable[[], object] | None = None) -> Forked:
    """Starts a command line in a forked process.

    Args:
        arguments: Of the command line; standard output goes nowhere.
        prepare: Called in the new process first.
    """
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return Forked(process, reading)
    status = _UNFORESEEN
    try:
        os.dup2(writing, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stderr, sys.stdout = open(2, "w", closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if prepare is not None:
            prepare()
        main(arguments)
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        os._exit(status)
