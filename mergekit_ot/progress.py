"""What is told while work is under way: steps done, and sentences."""

from __future__ import annotations

from collections.abc import Callable

Notify = Callable[[str], None]


Progress = Callable[[int, int, str], None]
