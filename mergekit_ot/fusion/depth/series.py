"""Blocks that stand in a row: by which of them two networks differ, read off the names and shapes of their states."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mergekit_ot.fusion.depth.matching import match_in_order

Shapes = Mapping[str, torch.Size]
# Name behind a block's own → shape: what two blocks share that can stand for one another.
Kind = tuple[tuple[str, torch.Size], ...]


class OtherNetworkError(Exception):
    """Two networks differ by more than blocks in a row."""


@final
@dataclass(frozen=True)
class Series:
    """Blocks in a row, of which one network has fewer.

    Attributes:
        shallow: Path → kind of the blocks of the network that has fewer, in order.
        deep: The same of the other.
    """

    shallow: Mapping[str, Kind]
    deep: Mapping[str, Kind]

    @property
    def repeated(self) -> list[str]:
        """Paths of the deeper network's blocks proper: what has the names of a kind that it has more of."""
        ours, theirs = Counter(self.shallow.values()), Counter(self.deep.values())
        names = {_names_of(kind) for kind, count in theirs.items() if count > ours[kind]}
        return [path for path, kind in self.deep.items() if _names_of(kind) in names]

    @property
    def is_possible(self) -> Bool[Tensor, "own other"]:
        """Whether a block (row) can be matched to one of the deeper network (column): they are of one kind."""
        return torch.tensor([[own == other for other in self.deep.values()] for own in self.shallow.values()])

    def costs(self, unlikeness: Float[Tensor, "own other"]) -> Float[Tensor, "own other"]:
        """Returns what matches cost: how unlike two blocks are, infinite where they are of two kinds."""
        return unlikeness.double().masked_fill(~self.is_possible, float("inf"))

    @property
    def has_match(self) -> bool:
        """Whether all blocks of the one can be matched to blocks of the other, in order."""
        return match_in_order(self.costs(torch.zeros(self.is_possible.shape))) is not None


@final
@dataclass(frozen=True)
class DepthDifference:
    """By which blocks one network is deeper than another.

    Attributes:
        series: Blocks in a row, of which the shallower network has fewer.
        names: Name in the deeper network → name in the shallower one, of everything outside the series.
    """

    series: tuple[Series, ...]
    names: Mapping[str, str]


def depth_difference(shallow: Shapes, deep: Shapes) -> DepthDifference | None:
    """Returns by which blocks a network is deeper than another; None where they differ by anything else.

    Blocks are told by numbers in names (``layer1.0``, ``blocks.3``, ``block2``). Layers between them are matched in
    order too, so that the last layer of a ``Sequential`` may stand at another number.

    Args:
        shallow: Name → shape of the network with fewer blocks.
        deep: Name → shape of the other.

    Example:
        >>> names = [*(f"blocks.{place}.up.weight" for place in range(3)), "head.weight"]
        >>> shapes = {name: torch.Size([4, 4]) for name in names}
        >>> del (fewer := dict(shapes))["blocks.2.up.weight"]
        >>> found = depth_difference(fewer, shapes)
        >>> [list(series.deep) for series in found.series], found.names
        ([['blocks.0', 'blocks.1', 'blocks.2']], {'head.weight': 'head.weight'})
    """
    series: list[Series] = []
    names: dict[str, str] = {}
    try:
        _compare(_Tree.of(shallow), _Tree.of(deep), series, names)
    except OtherNetworkError:
        return None
    return DepthDifference(tuple(series), names) if series and all(row.has_match for row in series) else None


@final
class _Tree:
    """Names as a tree of their parts."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.shape: torch.Size | None = None
        self.children: dict[str, _Tree] = {}

    @classmethod
    def of(cls, shapes: Shapes) -> _Tree:
        root = cls("")
        for name, shape in shapes.items():
            node = root
            for part in name.split("."):
                node = node.children.setdefault(part, cls(f"{node.path}.{part}".removeprefix(".")))
            node.shape = shape
        return root

    def rows(self) -> dict[str, list[_Tree]]:
        """Returns the children by the text before their number, each row in the order of its numbers."""
        rows: dict[str, list[tuple[int, _Tree]]] = {}
        for part, child in self.children.items():
            stem, number = _numbered(part)
            rows.setdefault(stem, []).append((number, child))
        return {stem: [child for _, child in sorted(row, key=lambda pair: pair[0])] for stem, row in rows.items()}

    def kind(self) -> Kind:
        """Returns what stands in it, under its names from here on."""
        return tuple((leaf.path.removeprefix(self.path), leaf.shape or torch.Size()) for leaf in self.leaves())

    def leaves(self) -> Iterable[_Tree]:
        """Yields everything in it that is a tensor."""
        if self.shape is not None:
            yield self
        for child in self.children.values():
            yield from child.leaves()


def _names_of(kind: Kind) -> frozenset[str]:
    return frozenset(name for name, _ in kind)


def _numbered(part: str) -> tuple[str, int]:
    """Returns a part of a name as text and number; 0 where it has none.

    Example:
        >>> _numbered("layer12"), _numbered("3"), _numbered("head")
        (('layer', 12), ('', 3), ('head', 0))
    """
    found = re.fullmatch(r"(.*?)(\d{1,9})", part)
    return (part, 0) if found is None else (found[1], int(found[2]))


def _compare(shallow: _Tree, deep: _Tree, series: list[Series], names: dict[str, str]) -> None:
    """Adds what two parts of networks differ by, and the names that they share.

    Raises:
        OtherNetworkError: They differ by more than blocks in a row.
    """
    if shallow.shape != deep.shape:
        raise OtherNetworkError
    if shallow.shape is not None:
        names[deep.path] = shallow.path
    ours, theirs = shallow.rows(), deep.rows()
    if ours.keys() != theirs.keys():
        raise OtherNetworkError
    for stem, row in ours.items():
        others = theirs[stem]
        if len(row) == len(others):
            for own, other in zip(row, others, strict=True):
                _compare(own, other, series, names)
        elif len(row) < len(others):
            series.append(Series(_kinds(row), _kinds(others)))
        else:
            raise OtherNetworkError


def _kinds(row: Sequence[_Tree]) -> dict[str, Kind]:
    return {block.path: block.kind() for block in row}
