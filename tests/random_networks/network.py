"""Random networks as hypothesis draws them, and what is made of a description."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from mergekit_ot import check_model
from mergekit_ot.graph.symmetry.check import CheckReport
from random_networks import attention, families, mixing, plain  # noqa: F401  # their classes are the kinds
from random_networks.block import (
    IMAGES,
    LENGTH,
    LINES,
    SIDE,
    Chain,
    Description,
    NetworkDescription,
    chain_of,
    fit,
    kinds,
    one_of,
)


class Network(nn.Module):
    """What a description says, with a source of features and a head that reads them."""

    def __init__(self, description: NetworkDescription) -> None:
        super().__init__()
        self.family, source, chain, self.head = description
        self.is_embedded = source != "linear"
        if self.is_embedded:
            self.source: nn.Module = nn.Embedding(7, 12)
        else:
            self.source = nn.Linear(5, 12) if self.family == LINES else nn.Conv2d(3, 12, 3, padding=1)
        self.places = nn.Parameter(torch.randn(LENGTH, 12)) if source == "embedding and places" else None
        self.blocks, width = chain_of(self.family, 12, chain)
        if self.head == "table":
            self.last = fit(self.family, width, 12)
        else:
            self.last = nn.Linear(width * LENGTH if self.head == "flatten" else width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.source(x)
        if self.places is not None:
            x = x + self.places
        x = self.blocks(x)
        if self.head == "table":
            return F.linear(self.last(x), self.source.weight)  # type: ignore[arg-type]
        if self.head == "flatten":
            return self.last(x.flatten(1))
        if self.head == "mean":
            return self.last(x.mean(1) if self.family == LINES else x.mean((2, 3)))
        return self.last(x.movedim(self.family, -1))


def made(description: NetworkDescription) -> Network:
    """Returns a fresh network; its first weights are the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network(description)


def inputs_of(description: NetworkDescription) -> Tensor:
    axis, source, _, _ = description
    if source != "linear":
        return torch.arange(2 * LENGTH).reshape(2, LENGTH) % 7
    return torch.randn(2, LENGTH, 5) if axis == LINES else torch.randn(2, 3, SIDE, SIDE)


def checked(description: NetworkDescription) -> CheckReport:
    return check_model(lambda: made(description), inputs_of(description), trials=1)


# The same chain stands in many blocks: it is described once.
@functools.cache
def blocks(axis: int, depth: int) -> st.SearchStrategy[Description]:
    """Returns blocks of a family that contain blocks down to `depth`."""
    found = []
    for name, kind in kinds().items():
        if axis in kind.axes and (depth > 0 or not kind.chains):
            inside = [chains(kind.inner or axis, depth - 1, 2) for _ in range(kind.chains)]
            found.append(st.tuples(st.just(name), st.tuples(*kind.draws), st.tuples(*inside)))
    return st.one_of(found)


@functools.cache
def chains(axis: int, depth: int, longest: int) -> st.SearchStrategy[Chain]:
    return st.lists(blocks(axis, depth), min_size=1, max_size=longest).map(tuple)


def networks(depth: int = 2, longest: int = 4) -> st.SearchStrategy[NetworkDescription]:
    heads = ("places", "mean", "flatten")
    return st.one_of(
        st.tuples(st.just(LINES), st.just("linear"), chains(LINES, depth, longest), one_of(*heads)),
        st.tuples(
            st.just(LINES),
            one_of("embedding", "embedding and places"),
            chains(LINES, depth, longest),
            one_of(*heads, "table"),
        ),
        st.tuples(st.just(IMAGES), st.just("linear"), chains(IMAGES, depth, longest), one_of(*heads)),
    )


def kinds_in(chain: Chain) -> Iterator[str]:
    for kind, _, inside in chain:
        yield kind
        for inner in inside:
            yield from kinds_in(inner)
