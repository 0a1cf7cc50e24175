"""Work in pieces that are the same for any number of threads: each on one thread, several beside each other.

A matrix product or a factorisation that a library shares out among threads adds up in another order for each number of
them, so that its last digits, and with them a choice of neurons, depend on the machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
# So many multiplications take a core some milliseconds; below that, waking another is not worth it.
_WORTH_SHARING = 1e8
# Set on the thread that hands out the work alone: what runs in a piece is not cut again.
_POOL: ContextVar[ThreadPoolExecutor | None] = ContextVar("pool", default=None)


@contextlib.contextmanager
def in_pieces() -> Iterator[None]:
    """Lets torch use one thread, and `each` as many beside each other as torch might use before."""
    most = torch.get_num_threads()
    if most == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(most, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            token = _POOL.set(pool)
            try:
                yield
            finally:
                _POOL.reset(token)
    finally:
        torch.set_num_threads(most)


def each(work: Callable[[_Item], _Result], pieces: Sequence[_Item], multiplications: float) -> list[_Result]:
    """Returns what some work makes of each piece, in order; pieces must not write to the same numbers.

    Args:
        work: What is done with a piece.
        pieces: The same for any number of threads.
        multiplications: How large the work is in all; what is small is done at once.
    """
    pool = _POOL.get() if multiplications >= _WORTH_SHARING else None
    return list(map(work, pieces)) if pool is None else list(pool.map(work, pieces))
