"""How many threads a piece of work gets: what is small stays on one, where several would only wait for each other."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

# So many multiplications take one core some hundredths of a second; below that, waking another is not worth it.
_PER_THREAD = 1e9


@contextlib.contextmanager
def threads_for(multiplications: float, chosen: int | None = None) -> Iterator[int]:
    """Lets torch use as many threads as some work is worth, and never more than it may use now; yields the number.

    Args:
        multiplications: How large the work is.
        chosen: The number to use instead.

    Example:
        >>> before = torch.get_num_threads()
        >>> with threads_for(1000) as count:
        ...     print(count)
        1
        >>> torch.get_num_threads() == before
        True
    """
    most = torch.get_num_threads()
    count = chosen or min(most, 1 + int(multiplications / _PER_THREAD))
    if count == most:
        yield count
        return
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(most)


def multiplications_of_run(parameters: int, inputs: Iterable[object]) -> float:
    """Returns about how many multiplications running a network takes: each weight once per place of each sample.

    Args:
        parameters: How many weights it has.
        inputs: A batch of inputs; every axis from the third on is one of places, of whole numbers from the second on.

    Example:
        >>> multiplications_of_run(100, (torch.zeros(2, 3, 8, 8),))
        12800.0
    """
    return float(parameters) * max((_places(value) for value in inputs if isinstance(value, Tensor)), default=1)


def _places(value: Tensor) -> int:
    if value.is_floating_point() and value.ndim > 1:
        return value.shape[0] * math.prod(value.shape[2:])
    return value.numel()
