"""What every block of a random network is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from hypothesis import strategies as st
from torch import Tensor, nn

LINES, IMAGES = 2, 1
# An image has as many places as a line is long, so that blocks for lines fit both.
SIDE, WIDTHS = 4, (12, 24)
LENGTH = SIDE**2
ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU, "tanh": nn.Tanh, "silu": nn.SiLU}

# A block is (kind, options, chains), a chain is a tuple of blocks, a network is (axis, source, chain, head).
Description = tuple[str, tuple[Any, ...], tuple[Any, ...]]
Chain = tuple[Description, ...]
NetworkDescription = tuple[int, str, Chain, str]


def one_of(*options: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(options)


def linear(axis: int, width: int, out: int, bias: bool = True) -> nn.Module:
    return nn.Linear(width, out, bias) if axis == LINES else nn.Conv2d(width, out, 1, bias=bias)


def fit(axis: int, width: int, out: int) -> nn.Module:
    return nn.Identity() if width == out else linear(axis, width, out)


def kinds() -> dict[str, type[Block]]:
    """Returns every kind of block by name."""
    return {kind.__name__: kind for kind in Block.__subclasses__()}


def chain_of(axis: int, width: int, descriptions: Chain) -> tuple[nn.Module, int]:
    """Returns the blocks of a chain one after the other, and how many features come out."""
    blocks: list[Block] = []
    for kind, options, chains in descriptions:
        blocks.append(kinds()[kind](axis, width, options, chains))
        width = blocks[-1].width
    return nn.Sequential(*blocks), width


class Block(nn.Module):
    """A part of a network with 12 or 24 features on both sides.

    Attributes:
        draws: What its options are drawn from.
        chains: How many chains of blocks it contains.
        axes: The families in which it stands.
        width: How many features it gives.
    """

    draws: ClassVar[tuple[st.SearchStrategy[Any], ...]] = ()
    chains: ClassVar[int] = 0
    inner: ClassVar[int | None] = None
    axes: ClassVar[tuple[int, ...]] = (LINES, IMAGES)

    def __init__(self, axis: int, width: int, options: Sequence[Any], chains: Sequence[Chain]) -> None:
        super().__init__()
        self.axis, self.width = axis, width
        self.setup(width, *options, *(chain_of(self.inner or axis, width, chain) for chain in chains))

    def setup(self, width: int, *arguments: Any) -> None:
        """Makes the layers."""

    def fitted(self, chain: tuple[nn.Module, int], out: int) -> nn.Sequential:
        """Returns a chain with `out` features at its end."""
        return nn.Sequential(chain[0], fit(self.axis, chain[1], out))

    def places(self, x: Tensor) -> tuple[int, ...]:
        """Returns the axes of positions."""
        return tuple(axis for axis in range(1, x.ndim) if axis != self.axis)

    def along(self, parameter: Tensor, x: Tensor) -> Tensor:
        """Returns a parameter with its first axis at the features."""
        return parameter.reshape(*parameter.shape, *[1] * (x.ndim - self.axis - parameter.ndim))
