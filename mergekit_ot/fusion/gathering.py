"""Families that only change places: one gather moves all members of all families at once."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from mergekit_ot.fusion.alignment import Alignment, FamilyCoupling
from mergekit_ot.graph.blocks import Block, context_place

# Group → where it is cut: (fused index, source index).
Cuts = Mapping[str, tuple[int, int]]


def gathered(
    block: Block,
    view: Tensor,
    groups: Mapping[int, str | None],
    cuts: Mapping[int, Cuts],
    alignment: Alignment,
    source: int,
) -> Tensor | None:
    """Returns a view with its dimensions moved to the fused neurons, None where that is no mere gather.

    Args:
        block: What the view was cut out of.
        view: Its dimensions are those of the block that `groups` names, in order.
        groups: Dimension of the block → its group, None where it keeps its order.
        cuts: Dimension → the outer neurons at which it was cut, by group.
        alignment: The couplings.
        source: Number of the source.
    """
    moving = {place: key for place, key in groups.items() if key is not None and key in alignment.couplings}
    if not any(isinstance(alignment.couplings[key][source], FamilyCoupling) for key in moving.values()):
        return None
    if not all(alignment.couplings[key][source].is_permutation for key in moving.values()):
        return None
    contexts: dict[int, list[int]] = {}
    for place, key in moving.items():
        outer = [each for each in alignment.target.groups[key].context if each not in cuts[place]]
        contexts[place] = [context_place(block.dimensions, place, each) for each in outer]
        if not set(contexts[place]) <= groups.keys() or any(groups[each] is None for each in contexts[place]):
            return None
    is_cut = any(cuts[place] for place in moving)
    if not is_cut and all(alignment.couplings[key][source].is_identity for key in moving.values()):
        return view
    sources = _Sources(block, groups, cuts, alignment, source)
    order, index = list(groups), []
    # What stays in place is copied in runs, behind what moves.
    led = {place for outer in contexts.values() for place in outer} | moving.keys()
    ahead = [place for place in order if place in led]
    for place in ahead:
        along = sorted([*contexts.get(place, []), place], key=ahead.index)
        values = sources.of(place, along) if place in moving else torch.arange(view.shape[order.index(place)])
        lengths = iter(values.shape)
        index.append(values.reshape([next(lengths) if each in along else 1 for each in ahead]).to(view.device))
    ways = [*ahead, *(place for place in order if place not in led)]
    moved = view.permute([order.index(place) for place in ways])[tuple(index)]
    return moved.permute([ways.index(place) for place in order])


class _Sources:
    """Which neuron of a source stands at each fused one, along a dimension and those that index it."""

    def __init__(
        self,
        block: Block,
        groups: Mapping[int, str | None],
        cuts: Mapping[int, Cuts],
        alignment: Alignment,
        source: int,
    ) -> None:
        self.block, self.groups, self.cuts, self.alignment, self.source = block, groups, cuts, alignment, source
        self.sizes = {place: alignment.target.groups[key].size for place, key in groups.items() if key is not None}

    def of(self, place: int, along: Sequence[int]) -> Int[Tensor, ...]:
        """Returns the neurons of the source, with a dimension for each of `along`."""
        whole = self.whole(place)
        if whole is not None:
            return whole.permute([self.standing(place).index(each) for each in along])
        outer = [each for each in along if each != place]
        rows = [
            self.partners(place, dict(zip(outer, fused, strict=True)))
            for fused in itertools.product(*(range(self.sizes[each]) for each in outer))
        ]
        shape = [*(self.sizes[each] for each in outer), self.sizes[place]]
        return torch.stack(rows).reshape(shape).movedim(-1, list(along).index(place))

    def whole(self, place: int) -> Int[Tensor, ...] | None:
        """Returns the partners of all members of a family that is not cut, indexed by what `standing` names."""
        key = self.groups[place] or ""
        found = self.alignment.couplings[key][self.source]
        if not isinstance(found, FamilyCoupling) or self.cuts[place].keys() & set(self.context(place)):
            return None
        sizes = [self.sizes[each] for each in self.standing(place)]
        return found.partners if found.partners is not None and list(found.partners.shape) == sizes else None

    def context(self, place: int) -> tuple[str, ...]:
        """Returns the groups that index a dimension."""
        return self.alignment.target.groups[self.groups[place] or ""].context

    def standing(self, place: int) -> list[int]:
        """Returns the dimensions that index one, and itself."""
        return [*(context_place(self.block.dimensions, place, each) for each in self.context(place)), place]

    def partners(self, place: int, fused: Mapping[int, int]) -> Int[Tensor, " n"]:
        """Returns the partners of all neurons along a dimension, where those that index it stand at `fused`."""
        key = self.groups[place] or ""
        pairs = []
        for outer in self.alignment.target.groups[key].context:
            if outer in self.cuts[place]:
                pairs.append(self.cuts[place][outer])
                continue
            at = context_place(self.block.dimensions, place, outer)
            pairs.append((fused[at], int(self.partners(at, fused)[fused[at]])))
        return self.alignment.coupling(key, self.source, tuple(pairs)).partners()
