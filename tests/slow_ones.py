"""Cases of one law that a default run leaves to the slow one: the first ones stay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def first_of(cases: Iterable[Any], count: int = 1) -> list[Any]:
    """Returns the cases, all but the first `count` marked slow."""
    return [case if place < count else pytest.param(case, marks=pytest.mark.slow) for place, case in enumerate(cases)]
