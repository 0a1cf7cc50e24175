"""Structured pruning by regression: which neurons do the maps that read them need least?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergekit_ot import Progress

# Pull of the regressions, relative to the mean square of an input. What a state loses to it, it loses at every step.
PULL, PULL_OF_STATES = 1e-3, 1e-5
# Drops of an elimination: so many at least, each of neurons of one group and source only.
_STEPS = 128


class Products:
    """Inner products of what a map reads in all sources, side by side, and of what it makes there.

    Args:
        has_shift: Whether the map has a bias, so that means do not count.
        pull: Of the regression.
    """

    def __init__(self, has_shift: bool, pull: float = PULL) -> None:
        self.has_shift, self.pull = has_shift, pull
        self.sums: list[Tensor] = []

    def add(self, inputs: Float[Tensor, "samples inputs"], outputs: Float[Tensor, "samples outputs"]) -> None:
        """Adds a batch."""
        ones = torch.ones(len(inputs), 1, dtype=inputs.dtype)
        rows, results = torch.cat([inputs, ones], 1), torch.cat([outputs, ones], 1)
        products = [(rows.T @ rows).double(), (rows.T @ results).double(), (results.T @ results).double()]
        self.sums = [a + b for a, b in zip(self.sums, products, strict=True)] if self.sums else products

    def towards(
        self, goals: Float[Tensor, "outputs goals"]
    ) -> tuple[Float[Tensor, "inputs inputs"], Float[Tensor, "inputs goals"], float]:
        """Returns the products of a regression of some goals, sums of outputs, and the goals' length."""
        gram, cross, square = self.sums
        count, means, heights = gram[-1, -1], gram[-1, :-1], square[-1, :-1]
        gram, cross, square = gram[:-1, :-1], cross[:-1, :-1], square[:-1, :-1]
        if self.has_shift:
            gram = gram - torch.outer(means, means) / count
            cross = cross - torch.outer(means, heights) / count
            square = square - torch.outer(heights, heights) / count
        pull = self.pull * gram.diagonal().mean() + torch.finfo(torch.float64).tiny
        goals = goals.double()
        size = float(((square @ goals) * goals).sum().clamp_min(torch.finfo(torch.float64).tiny))
        return gram + pull * torch.eye(len(gram), dtype=gram.dtype), cross @ goals, size**0.5


class Regression:
    """The regression of one map's goals while neurons that it reads are dropped.

    Args:
        products: Of the map.
        goals: What it is to make, as sums of what it makes in the sources ``[outputs, goals]``.
        neurons: Numbers of the neurons it reads; each has as many inputs of it.
        made: Numbers of the neurons that the goals are, where they may be dropped themselves.
    """

    def __init__(
        self,
        products: Products,
        goals: Float[Tensor, "outputs goals"],
        neurons: Int[Tensor, " neuron"],
        made: Int[Tensor, " goal"] | None = None,
    ) -> None:
        gram, cross, self.length = products.towards(goals)
        self.neurons, self.made = neurons, made
        self.taps = len(gram) // len(neurons)
        self.inverse = torch.linalg.inv(gram)
        # In units of the goals' length, so that losses of several maps can be added.
        self.weights = self.inverse @ cross / self.length

    def losses(self) -> Float[Tensor, " neuron"]:
        """Returns what the squared error grows by without each neuron, as a share of the goals."""
        count = len(self.neurons)
        places = torch.arange(count)
        blocks = self.inverse.reshape(count, self.taps, count, self.taps)[places, :, places, :]
        weights = self.weights.reshape(count, self.taps, -1)
        return (weights * torch.linalg.solve(blocks, weights)).sum((1, 2))

    def drop(self, neurons: Int[Tensor, " dropped"]) -> bool:
        """Takes neurons out, and returns whether the map reads or makes any of them."""
        is_less = False
        if self.made is not None:
            is_made = ~torch.isin(self.made, neurons)
            is_less = not bool(is_made.all())
            self.weights, self.made = self.weights[:, is_made], self.made[is_made]
        is_gone = torch.isin(self.neurons, neurons)
        if not bool(is_gone.any()):
            return is_less
        gone, kept = (self._columns(mask.nonzero()[:, 0]) for mask in (is_gone, ~is_gone))
        inner, outer = self.inverse[gone][:, gone], self.inverse[kept][:, gone]
        self.weights = self.weights[kept] - outer @ torch.linalg.solve(inner, self.weights[gone])
        self.inverse = self.inverse[kept][:, kept] - outer @ torch.linalg.solve(inner, outer.T)
        self.neurons = self.neurons[~is_gone]
        return True

    def rows(
        self, order: Int[Tensor, " neuron"], made: Int[Tensor, " goal"] | None = None, repeats: int = 1
    ) -> Float[Tensor, "goals inputs"]:
        """Returns the weights that are left, with the neurons it reads (and makes, so often each) in an order."""
        rows = self.weights[self._columns(places_of(order, self.neurons))].T * self.length
        return rows if self.made is None or made is None else rows[places_of(made, self.made, repeats)]

    def _columns(self, neurons: Tensor) -> Tensor:
        return (neurons[:, None] * self.taps + torch.arange(self.taps)).flatten()


def places_of(
    wanted: Int[Tensor, " neuron"], numbers: Int[Tensor, " place"], repeats: int = 1
) -> Int[Tensor, " found"]:
    """Returns where neurons stand in a list of numbers: all at their first place, then all at their second."""
    places = [(numbers == neuron).nonzero()[:repeats, 0] for neuron in wanted]
    return torch.stack(places, 1).flatten() if places else torch.empty(0, dtype=torch.long)


def eliminate(
    regressions: Sequence[Regression],
    places: Mapping[str, Sequence[Int[Tensor, " neuron"]]],
    sizes: Mapping[str, int],
    progress: Progress | None = None,
) -> dict[str, Int[Tensor, " kept"]]:
    """Returns the neurons of each group that are left when all that are too many are dropped, the least needed first.

    A neuron's loss is that of all regressions together (backward elimination; for groups of weights as in optimal
    brain surgery, NeurIPS 1992).

    Args:
        regressions: Of the maps that read the groups; they are changed.
        places: Group → the numbers of its neurons in each source.
        sizes: Group → how many of its neurons are kept.
        progress: Told the neurons dropped, those to be dropped, and what is done.
    """
    left = {group: torch.cat(list(of_sources)) for group, of_sources in places.items()}
    count = 1 + int(torch.cat([regression.neurons for regression in regressions]).max())
    group_of, source_of = _owners(places, count)
    groups = list(places)
    losses = [regression.losses() for regression in regressions]
    surplus = sum(max(0, len(left[group]) - sizes[group]) for group in groups)
    dropped = 0
    while dropped < surplus:
        total = _total(regressions, losses, count)
        candidates = torch.cat([left[group] for group in groups if len(left[group]) > sizes[group]])
        least = candidates[total[candidates].argmin()]
        group = groups[int(group_of[least])]
        # Two neurons that stand in for each other, as of a network and its copy, must not go together.
        alike = left[group][source_of[left[group]] == source_of[least]]
        most = max(1, (sum(map(len, places[group])) - sizes[group]) // _STEPS)
        gone = alike[total[alike].argsort()[: min(most, len(left[group]) - sizes[group])]]
        left[group] = left[group][~torch.isin(left[group], gone)]
        for number, regression in enumerate(regressions):
            if regression.drop(gone):
                losses[number] = regression.losses()
        dropped += len(gone)
        if progress is not None:
            progress(dropped, surplus, "refit: choosing neurons")
    return left


def _total(
    regressions: Sequence[Regression], losses: Sequence[Float[Tensor, " neuron"]], count: int
) -> Float[Tensor, " neuron"]:
    """Returns what all regressions together lose with each of `count` neurons."""
    total = torch.zeros(count, dtype=torch.float64)
    for regression, loss in zip(regressions, losses, strict=True):
        total.index_add_(0, regression.neurons, loss)
    return total


def _owners(
    places: Mapping[str, Sequence[Int[Tensor, " neuron"]]], count: int
) -> tuple[Int[Tensor, " neuron"], Int[Tensor, " neuron"]]:
    """Returns, for each of `count` neurons, the number of its group and of its source; -1 where it has none."""
    group_of, source_of = torch.full((count,), -1), torch.full((count,), -1)
    for number, of_sources in enumerate(places.values()):
        for source, neurons in enumerate(of_sources):
            group_of[neurons], source_of[neurons] = number, source
    return group_of, source_of
