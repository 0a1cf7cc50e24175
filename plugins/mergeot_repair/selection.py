"""Chooses neurons of the fused model among those of the sources, by what the maps that read them need.

The mean of two matched neurons that agree little says little about either. Where a layer of neurons is made by one
linear map and read by linear maps alone, the fused model need not average at all: the sources side by side are a
network of which the fused one is a part, and the part is chosen by structured pruning. From all neurons of all sources
those are dropped, one after the other, without which a regression of the readers' outputs on the rest loses least
(backward elimination; the loss is that of optimal brain surgery for groups, NeurIPS 1992).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergekit_ot import ModelGraph
from mergeot_repair.maps import RECURRENT, LinearMap

# Pull of the regressions, relative to the mean square of an input.
_PULL = 1e-3
# Inputs of a regression beyond which its inverse takes minutes and gigabytes.
MOST_INPUTS = 10_000
# Steps of an elimination: so many at least, each dropping neurons of one source only.
_STEPS = 128


@dataclass(frozen=True)
class Chosen:
    """The neurons that a fused layer takes over.

    Attributes:
        source: Of each fused neuron, which source it is of.
        neuron: Its number there.
    """

    source: Int[Tensor, " neuron"]
    neuron: Int[Tensor, " neuron"]

    def of(self, values: Sequence[Tensor], axis: int) -> Tensor:
        """Returns the chosen neurons' values out of those of all sources, with the neurons on `axis`."""
        starts = torch.tensor([0, *(part.shape[axis] for part in values)]).cumsum(0)
        return torch.cat(list(values), axis).index_select(axis, starts[self.source] + self.neuron)


@dataclass(frozen=True)
class Layer:
    """A group of neurons that is made by one map and read by maps alone."""

    group: str
    maker: LinearMap
    readers: tuple[LinearMap, ...]


def layers_of(graph: ModelGraph, maps: Sequence[LinearMap], state: Mapping[str, Tensor]) -> list[Layer]:
    """Returns the layers whose neurons may be chosen, in the order of their makers."""
    by_weight = {one.weight: one for one in maps if one.kind != RECURRENT}
    owned = {name: one for one in by_weight.values() for name in (one.weight, one.bias, *(one.norm or ())) if name}
    found = []
    for group in graph.free_groups.values():
        # What is normalised over its neurons, or shares an order with others, is no set of independent neurons.
        if group.context or group.flags:
            continue
        makers = {slot.parameter for slot in group.members if slot.role != "IN"}
        readers = {slot.parameter for slot in group.members if slot.role == "IN"}
        owners = {owned[name].weight for name in makers if name in owned}
        if len(owners) != 1 or not makers <= set(owned) or not readers or not readers <= set(by_weight):
            continue
        (maker,) = owners
        whole = [slot for slot in group.members if slot.role == "IN"]
        is_plain = state[maker].shape[0] == group.size and maker not in readers
        is_first = all(slot.axis == 1 and slot.path in ((), (0,)) for slot in whole) and len(whole) == len(readers)
        is_whole = all(state[name].flatten(1).shape[1] % group.size == 0 for name in readers)
        if is_plain and is_first and is_whole and _covers(graph, readers, group.key):
            found.append(Layer(group.key, by_weight[maker], tuple(by_weight[name] for name in sorted(readers))))
    places = {one.weight: place for place, one in enumerate(maps)}
    return sorted(found, key=lambda layer: places[layer.maker.weight])


def _covers(graph: ModelGraph, readers: set[str], group: str) -> bool:
    """Whether nothing but the neurons of one group stands on the axis that a reader reads."""
    from_group = []
    for name in readers:
        keys = {key for (parameter, axis, key) in graph.roles if parameter == name and axis == 1}
        from_group.append({key for key in keys if graph.groups[key].is_free} == {group})
    return all(from_group)


class Needs:
    """What a reader takes: inner products of its inputs from all sources, and of those with its outputs in them.

    Args:
        has_shift: Whether the reader has a bias, so that means do not count.
    """

    def __init__(self, has_shift: bool) -> None:
        self.has_shift = has_shift
        self.products: list[Tensor] = []

    def add(self, inputs: Float[Tensor, "samples inputs"], outputs: Float[Tensor, "samples outputs"]) -> None:
        """Adds a batch, with the inputs and outputs of all sources side by side."""
        ones = torch.ones(len(inputs), 1, dtype=inputs.dtype)
        rows, made = torch.cat([inputs, ones], 1), torch.cat([outputs, ones], 1)
        found = [(rows.T @ rows).double(), (rows.T @ made).double(), (made.T @ made).double()]
        self.products = [a + b for a, b in zip(self.products, found, strict=True)] if self.products else found

    def towards(
        self, goals: Float[Tensor, "outputs goals"]
    ) -> tuple[Float[Tensor, "inputs inputs"], Float[Tensor, "inputs goals"], float]:
        """Returns the products of a regression of some goals, sums of outputs, and the goals' mean square over all."""
        gram, cross, square = self.products
        count, means, heights = gram[-1, -1], gram[-1, :-1], square[-1, :-1]
        gram, cross, square = gram[:-1, :-1], cross[:-1, :-1], square[:-1, :-1]
        if self.has_shift:
            gram = gram - torch.outer(means, means) / count
            cross = cross - torch.outer(means, heights) / count
            square = square - torch.outer(heights, heights) / count
        pull = _PULL * gram.diagonal().mean() + torch.finfo(torch.float64).tiny
        goals = goals.double()
        size = float(((square @ goals) * goals).sum().clamp_min(torch.finfo(torch.float64).tiny))
        return gram + pull * torch.eye(len(gram), dtype=gram.dtype), cross @ goals, size


class _Regression:
    """The regression of one reader while neurons are dropped: its inverse and its weights, in blocks of a neuron."""

    def __init__(self, gram: Tensor, cross: Tensor, neurons: int) -> None:
        self.inverse = torch.linalg.inv(gram)
        self.weights = self.inverse @ cross
        self.taps = len(gram) // neurons

    def losses(self) -> Float[Tensor, " neuron"]:
        """Returns what the squared error grows by without each neuron."""
        count = len(self.weights) // self.taps
        places = torch.arange(count)
        blocks = self.inverse.reshape(count, self.taps, count, self.taps)[places, :, places, :]
        weights = self.weights.reshape(count, self.taps, -1)
        return (weights * torch.linalg.solve(blocks, weights)).sum((1, 2))

    def drop(self, neurons: Int[Tensor, " dropped"]) -> None:
        """Takes neurons out."""
        is_kept = torch.ones(len(self.weights) // self.taps, dtype=torch.bool)
        is_kept[neurons] = False
        gone, kept = (self._columns(mask.nonzero()[:, 0]) for mask in (~is_kept, is_kept))
        inner, outer = self.inverse[gone][:, gone], self.inverse[kept][:, gone]
        self.weights = self.weights[kept] - outer @ torch.linalg.solve(inner, self.weights[gone])
        self.inverse = self.inverse[kept][:, kept] - outer @ torch.linalg.solve(inner, outer.T)

    def _columns(self, neurons: Tensor) -> Tensor:
        return (neurons[:, None] * self.taps + torch.arange(self.taps)).flatten()


def choose(
    needs: Sequence[Needs], goals: Sequence[Tensor], sizes: Sequence[int], count: int
) -> tuple[Chosen, list[Float[Tensor, "goals inputs"]]]:
    """Returns the neurons that the readers can least do without, and each reader's weights for them.

    Args:
        needs: Of each reader; its inputs are the neurons of the first source, then of the second …, with as many
            numbers each as the reader takes of a neuron.
        goals: What each reader is to make, as sums of its outputs in the sources ``[outputs, goals]``.
        sizes: Neurons of each source.
        count: How many are kept.
    """
    total, regressions, units = sum(sizes), [], []
    for need, goal in zip(needs, goals, strict=True):
        gram, cross, size = need.towards(goal)
        units.append(size**0.5)
        regressions.append(_Regression(gram, cross / size**0.5, total))
    source = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    neuron = torch.cat([torch.arange(size) for size in sizes])
    most = max(1, (total - count) // _STEPS)
    while len(source) > count:
        losses = torch.stack([one.losses() for one in regressions]).sum(0)
        # Two neurons that stand in for each other, as of a network and its copy, must not go together.
        same = source == source[losses.argmin()]
        order = torch.where(same, losses, torch.full_like(losses, torch.inf)).argsort()
        gone = order[: min(most, len(source) - count, int(same.sum()))]
        for one in regressions:
            one.drop(gone)
        is_kept = torch.ones(len(source), dtype=torch.bool)
        is_kept[gone] = False
        source, neuron = source[is_kept], neuron[is_kept]
    weights = [one.weights.T * unit for one, unit in zip(regressions, units, strict=True)]
    return Chosen(source, neuron), weights
