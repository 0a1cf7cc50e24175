"""What a run tells on standard error while it works: lines that stay, and one that is replaced."""

from __future__ import annotations

import sys
import time

# Into a file, where nothing can be replaced, a passing line is written this often at most.
_SECONDS = 30.0


class ProgressLine:
    """Writes lines on standard error."""

    def __init__(self) -> None:
        self._is_passing = False
        self._written = time.monotonic()

    def stay(self, text: str) -> None:
        """Writes a line that stays."""
        self.clear()
        print(text, file=sys.stderr, flush=True)
        self._written = time.monotonic()

    def pass_by(self, text: str) -> None:
        """Writes a line that the next one replaces."""
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[2K{text[:118]}")
            sys.stderr.flush()
            self._is_passing = True
        elif time.monotonic() - self._written > _SECONDS:
            self.stay(text)

    def clear(self) -> None:
        """Takes the passing line away."""
        if self._is_passing:
            sys.stderr.write("\r\x1b[2K")
            self._is_passing = False


class Estimate:
    """How long the rest takes, if each part takes as long as those before it."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._started = total, 0, time.monotonic()

    def step(self) -> str:
        """Counts one part, and returns where the run is: ``[3/12, 40 s left]``."""
        self._done += 1
        left = (time.monotonic() - self._started) / self._done * (self._total - self._done)
        return f"[{self._done}/{self._total}, {duration(left)} left]"


def duration(seconds: float) -> str:
    """Returns a duration for a reader.

    Example:
        >>> duration(75), duration(40), duration(4000)
        ('1 min 15 s', '40 s', '1 h 6 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
