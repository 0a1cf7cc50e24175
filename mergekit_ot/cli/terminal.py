"""What is told while a command runs: notes, and one line that shows how far it is and how long it will take."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from mergekit_ot.text import printable

_QUIET_SECONDS = 2.0
_BEAT_SECONDS = 1.0
_USUAL_WIDTH = 80
# Where no terminal shows a line, one is written after so many seconds, and then after twice as many each time.
_FIRST_LOG_SECONDS = 10.0
_CLEAR = "\r\x1b[2K"
_writing = threading.RLock()


class _Shown:
    """Whether the last line of the terminal is one that the next thing written has to replace."""

    is_there = False


def is_terminal() -> bool:
    """Whether standard error is a terminal on which a line can be replaced."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def note(text: str) -> None:
    """Prints a line for the reader on standard error; nothing that comes from a file or a name acts on the terminal."""
    with _writing:
        _clear()
        print(printable(text), file=sys.stderr, flush=True)


def _clear() -> None:
    if _Shown.is_there:
        sys.stderr.write(_CLEAR)
        _Shown.is_there = False


@contextlib.contextmanager
def working() -> Iterator[StepLine]:
    """Keeps standard output for the result, and shows how far the work is.

    Whatever the user's own code prints meanwhile goes to standard error.
    """
    with contextlib.redirect_stdout(sys.stderr), StepLine() as step:
        yield step


class StepLine:
    """Shows which step runs, and for how long yet: one line on a terminal, a few lines in a log.

    Nothing is shown of work that is done within two seconds.

    Args:
        clock: Tells the seconds.
        beats: Whether time that passes without a step is shown too.

    Example:
        >>> seconds = iter([0.0, 0.0, 30.0, 30.0])
        >>> line = StepLine(lambda: next(seconds), beats=False)
        >>> line(0, 10, "groups")
        >>> line.sentence(), line(5, 10, "groups"), line.sentence()
        ('step 0/10  groups', None, 'step 5/10, about 30 s left  groups')
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, *, beats: bool = True) -> None:
        self._clock, self._beats = clock, beats
        self._begun = clock()
        self._done, self._total, self._name = sys.maxsize, 0, ""
        self._since, self._from = self._begun, 0
        self._left: float | None = None
        self._next_log = _FIRST_LOG_SECONDS
        self._is_over = threading.Event()

    def __enter__(self) -> StepLine:
        if self._beats:
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __call__(self, done: int, total: int, name: str) -> None:
        """Takes the step that is done last."""
        now = self._clock()
        # A count that starts anew belongs to a new part, of which nothing is known yet.
        if done < self._done or total != self._total:
            self._since, self._from = now, done
        self._done, self._total, self._name = done, total, name
        steps = done - self._from
        is_known = steps > 0 and done < total and now - self._since > _QUIET_SECONDS
        self._left = (now - self._since) / steps * (total - done) if is_known else None
        self._show(now)

    def sentence(self) -> str:
        """Returns how far the work is."""
        step = f"step {self._done}/{self._total}" if self._total else "working"
        if not self._name:
            return step
        left = "" if self._left is None else f", about {_spoken(self._left)} left"
        return f"{step}{left}  {printable(self._name)[:60]}"

    def _beat(self) -> None:
        while not self._is_over.wait(_BEAT_SECONDS):
            self._show(self._clock())

    def _show(self, now: float) -> None:
        spent = now - self._begun
        if spent < _QUIET_SECONDS or self._is_over.is_set():
            return
        if not is_terminal():
            if spent >= self._next_log:
                self._next_log = 2 * max(self._next_log, spent)
                note(f"After {_spoken(spent)}: {self.sentence()}")
            return
        width = _width()
        with _writing:
            sys.stderr.write(f"{_CLEAR}  {_spoken(spent)}, {self.sentence()}"[: width + len(_CLEAR) - 1])
            sys.stderr.flush()
            _Shown.is_there = True

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        with _writing:
            _clear()
            sys.stderr.flush()


def _width() -> int:
    try:
        # Some terminals say that they have no columns.
        return os.get_terminal_size(sys.stderr.fileno()).columns or _USUAL_WIDTH
    except (OSError, ValueError):
        return _USUAL_WIDTH


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
