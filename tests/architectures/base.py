"""What a test architecture is: a fresh module each time, and inputs that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sample:
    """An architecture with inputs for it; its groups stand in the golden file.

    Attributes:
        make: Gives a fresh instance that was never run.
        inputs: Gives positional inputs, the same ones each time.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[object, ...]]


def images(channels: int, size: int = 8, count: int = 2) -> Callable[[], tuple[Tensor, ...]]:
    """Returns what makes a batch of square images."""
    return lambda: (torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0)),)


def numbers(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    """Returns what makes one tensor of random numbers."""
    return lambda: (torch.randn(*shape, generator=torch.Generator().manual_seed(0)),)


def tokens(vocabulary: int, length: int = 7, count: int = 2) -> Callable[[], tuple[Tensor, ...]]:
    """Returns what makes a batch of token sequences."""
    return lambda: (torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(0)),)
