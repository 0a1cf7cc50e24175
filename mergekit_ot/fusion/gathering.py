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
    sources = _Sources(block, groups, cuts, alignment, source)
    still = {place for place, key in moving.items() if not cuts[place] and alignment.couplings[key][source].is_identity}
    order = list(groups)
    for cluster in _clusters(order, contexts):
        if set(cluster) & moving.keys() <= still:
            continue
        at = [order.index(place) for place in cluster]
        index = sources.known(cluster, contexts, [view.shape[each] for each in at]).to(view.device)
        view = _taken(view, at, index)
    return view


def _clusters(order: Sequence[int], contexts: Mapping[int, Sequence[int]]) -> list[list[int]]:
    """Returns the dimensions that move together, each with those that index it, in their order."""
    clusters: list[set[int]] = []
    for place, outer in contexts.items():
        joined = {place, *outer}.union(*(each for each in clusters if each & {place, *outer}))
        clusters = [*(each for each in clusters if not each & joined), joined]
    return [sorted(cluster, key=order.index) for cluster in clusters]


def _taken(view: Tensor, at: Sequence[int], index: Int[Tensor, ...]) -> Tensor:
    """Returns a view with some dimensions in the order of an index into all of them together."""
    first = at[0]
    together = list(range(first, first + len(at)))
    ahead = view if list(at) == together else view.movedim(list(at), together)
    taken = ahead.flatten(first, together[-1]).index_select(first, index.flatten()).unflatten(first, index.shape)
    return taken if ahead is view else taken.movedim(together, list(at))


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

    def known(
        self, cluster: Sequence[int], contexts: Mapping[int, Sequence[int]], sizes: Sequence[int]
    ) -> Int[Tensor, ...]:
        """Returns what `together` does; other tensors with the same neurons may have asked for it before."""
        held = tuple(
            self.alignment.couplings[self.groups[place] or ""][self.source] for place in cluster if place in contexts
        )
        families = [found for found in held if isinstance(found, FamilyCoupling)]
        if not families and len(cluster) == 1:
            return self.partners(cluster[0], {})
        if not families or any(self.cuts[place] for place in cluster):
            return self.together(cluster, contexts, sizes)
        places = tuple(
            (self.groups[place], *(cluster.index(each) for each in contexts.get(place, ()))) for place in cluster
        )
        before = families[-1].indices.get(places)
        if before is None or any(new is not old for new, old in zip(held, before[0], strict=True)):
            before = held, self.together(cluster, contexts, sizes)
            families[-1].indices[places] = before
        return before[1]

    def together(
        self, cluster: Sequence[int], contexts: Mapping[int, Sequence[int]], sizes: Sequence[int]
    ) -> Int[Tensor, ...]:
        """Returns where each fused combination of neurons stands among all of the source, along several dimensions.

        Args:
            cluster: The dimensions.
            contexts: Dimension that moves → those of them that index it.
            sizes: Neurons along each.
        """
        device = self.block.view.device
        index = torch.zeros([1] * len(cluster), dtype=torch.long, device=device)
        for place, size in zip(cluster, sizes, strict=True):
            along = [each for each in cluster if each == place or each in contexts.get(place, ())]
            values = self.of(place, along).to(device) if place in contexts else torch.arange(size, device=device)
            index = index * size + values.reshape(
                [values.shape[along.index(each)] if each in along else 1 for each in cluster]
            )
        return index

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
