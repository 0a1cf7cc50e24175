"""What is told while work is under way: steps done, and sentences."""

from __future__ import annotations

from collections.abc import Callable

# Told a sentence.
Notify = Callable[[str], None]

# Told (steps done, steps in all, what is done).
Progress = Callable[[int, int, str], None]
