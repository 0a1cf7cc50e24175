"""Commands in processes of their own that are forked from this one, so that none of them imports torch anew."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_ot.cli.app import main

_UNFORESEEN = 99


@dataclass
class Forked:
    """A command that runs, and what it printed on standard error."""

    process: int
    errors: Path

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal."""
        os.kill(self.process, number)

    def status(self) -> int:
        """Waits and returns the exit status, negative where a signal ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])

    def end(self, limit: float = 60.0) -> int:
        """Waits at most so long, and returns the status.

        Raises:
            TimeoutError: It was not over; it is then.
        """
        until = time.monotonic() + limit
        while time.monotonic() < until:
            process, state = os.waitpid(self.process, os.WNOHANG)
            if process:
                return os.waitstatus_to_exitcode(state)
            time.sleep(0.01)
        self.kill()
        self.status()
        raise TimeoutError(f"not over after {limit} s: {self.text}")

    @property
    def text(self) -> str:
        """What it printed on standard error."""
        return self.errors.read_text(errors="replace")


def forked(arguments: Sequence[str], errors: Path, prepare: Callable[[], object] | None = None) -> Forked:
    """Starts a command line in a forked process.

    Args:
        arguments: Of the command line.
        errors: File for standard error; standard output goes nowhere.
        prepare: Called in the new process first.
    """
    process = os.fork()
    if process:
        return Forked(process, errors)
    status = _UNFORESEEN
    try:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stderr, sys.stdout = open(2, "w", closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if prepare is not None:
            prepare()
        main(arguments)
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        os._exit(status)
