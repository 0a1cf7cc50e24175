"""Blocks of a source beside those of what it is coupled with, where families of neurons are to be coupled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from mergekit_ot.fusion.alignment import Pairs
from mergekit_ot.fusion.faced_tensors import FacedTensors
from mergekit_ot.fusion.group_view import GroupView
from mergekit_ot.fusion.moving import transport_block
from mergekit_ot.fusion.widening import Anchor
from mergekit_ot.graph.blocks import Block, context_place, places_of
from mergekit_ot.graph.layouts import IN
from mergekit_ot.transport.solver import Scope


@dataclass(frozen=True)
class FacedBlock:
    """A block of a source that describes a group at one of its dimensions, and the same of what it is coupled with."""

    view: GroupView
    source: int
    anchor: Anchor
    name: str
    block: Block
    ours: Tensor
    place: int
    held: tuple[int, ...]

    def at(self, pairs: Pairs) -> FacedTensors:
        """Returns both at a pair of outer neurons, the group and its families in the order of each."""
        alignment, dimensions = self.view.alignment, self.block.dimensions
        context = alignment.target.groups[self.view.group].context
        fixed = {context_place(dimensions, self.place, key): pair for key, pair in zip(context, pairs, strict=True)}
        kept = (self.place, *self.held)
        theirs = transport_block(self.block, self.name, alignment, self.source, frozenset(kept), fixed)
        ours = self.ours
        for place in sorted(fixed, reverse=True):
            ours = ours.select(place, self.anchor.original(dimensions[place].group or "", fixed[place][0]))
        left = [place for place in range(len(dimensions)) if place not in fixed]
        open_places, groups = [left.index(place) for place in kept], []
        for place in kept:
            key = dimensions[place].group or ""
            groups.append(key)
            if alignment.graphs[self.source].roles[self.name, dimensions[place].axis, key] == IN:
                theirs = theirs * (dimensions[place].size / self.anchor.size(key, alignment.target))
        ours, theirs = (
            each.movedim(open_places, list(range(len(kept)))).flatten(len(kept))
            if each.ndim > len(kept)
            else each.movedim(open_places, list(range(len(kept)))).unsqueeze(-1)
            for each in (ours, theirs)
        )
        return FacedTensors(ours, theirs, tuple(groups))

    def members(self) -> tuple[Tensor, Tensor]:
        """Returns both for all members of a family side by side: a dimension of members, one of neurons, a flat one."""
        alignment, dimensions = self.view.alignment, self.block.dimensions
        context = alignment.target.groups[self.view.group].context
        theirs = transport_block(self.block, self.name, alignment, self.source, frozenset([self.place]))
        fused, own = (graph.groups[self.view.group].size for graph in (alignment.target, alignment.graphs[self.source]))
        if alignment.graphs[self.source].roles[self.name, dimensions[self.place].axis, self.view.group] == IN:
            theirs = theirs * (own / fused)
        leading = [*(context_place(dimensions, self.place, key) for key in context), self.place]
        sides = (each.movedim(leading, list(range(len(leading)))) for each in (self.ours, theirs))
        ours, theirs = (each.reshape(-1, each.shape[len(context)], *each.shape[len(leading) :]) for each in sides)
        first, second = (each.flatten(2) if each.ndim > 2 else each[:, :, None] for each in (ours, theirs))
        return first, second


def faced_blocks(
    view: GroupView,
    source: int,
    others: Mapping[int, float],
    families: Mapping[str, tuple[str, ...]],
    anchor: Anchor,
) -> Iterator[FacedBlock]:
    """Yields the blocks that describe a group of a source, with the families that it holds.

    Args:
        view: The group.
        source: The source.
        others: The sources that it is coupled with, and their shares.
        families: The families to be coupled, and what each is indexed by.
        anchor: In whose size outer neurons are coupled.
    """
    alignment = view.alignment
    for found in zip(*(view.blocks(number) for number in (source, *others)), strict=True):
        name, block = found[0]
        places = [(place, _held_at(block, place, view.group, families)) for place in places_of(block, view.group)]
        usable = [(place, held) for place, held in places if _is_usable(view, source, name, block, (place, *held))]
        if usable:
            moved = []
            for (number, share), (_, other) in zip(others.items(), found[1:], strict=True):
                values = transport_block(other, name, alignment, number)
                moved.append(values if share == 1 else share * values)
            ours = sum(moved[1:], moved[0])
            for place, dimension in enumerate(block.dimensions):
                reads = alignment.graphs[source].roles.get((name, dimension.axis, dimension.group or "")) == IN
                ours = anchor.without_copies(dimension.group or "", ours, place, reads)
            for place, held in usable:
                yield FacedBlock(view, source, anchor, name, block, ours, place, held)


def _held_at(block: Block, place: int, group: str, families: Mapping[str, tuple[str, ...]]) -> tuple[int, ...]:
    """Returns the dimensions on which families stand that are indexed by a group at a dimension."""
    return tuple(
        other
        for other, dimension in enumerate(block.dimensions)
        if dimension.group in families and context_place(block.dimensions, other, group) == place
    )


def _is_usable(view: GroupView, source: int, name: str, block: Block, kept: tuple[int, ...]) -> bool:
    """Whether all that stands beside what is coupled is aligned, and nothing of it stands there twice."""
    keys = [block.dimensions[place].group for place in kept]
    roles = view.alignment.graphs[source].roles
    if view.scope is Scope.INCOMING:
        mine = [d for d in block.dimensions if d.group == view.group]
        if any(roles[name, d.axis, view.group] == IN for d in mine):
            return False
    beside = [d.group for place, d in enumerate(block.dimensions) if place not in kept]
    return len(set(keys)) == len(keys) and all(view.alignment.is_aligned(key) for key in beside)
