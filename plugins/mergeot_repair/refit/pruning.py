"""Structured pruning by regression: which neurons do the maps that read them need least?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mergekit_ot import Progress
from mergeot_repair.refit.grams import Gram, centred, inverse_of

# Pull of the regressions, relative to the mean square of an input. What a state loses to it, it loses at every step.
PULL, PULL_OF_STATES = 1e-3, 1e-5
# Drops of an elimination: so many at least, each of neurons of one group and source only.
_STEPS = 128
# Inputs dropped before the inverse of a regression is changed, and the share of neurons left at which it is made
# smaller.
_TOGETHER, _FULL = 128, 0.9


class Products:
    """Inner products of what a map reads in all sources, side by side, and of what it makes there.

    Args:
        has_shift: Whether the map has a bias, so that means do not count.
        pull: Of the regression.
    """

    def __init__(self, has_shift: bool, pull: float = PULL) -> None:
        self.has_shift, self.pull = has_shift, pull
        self._gram, self._square = Gram(0), Gram(0)
        self._cross = torch.empty(0, 0)

    def add(self, inputs: Float[Tensor, "samples inputs"], outputs: Float[Tensor, "samples outputs"]) -> None:
        """Adds a batch."""
        self.add_parts([inputs], [outputs])

    def add_parts(
        self,
        inputs: Sequence[Float[Tensor, "samples inputs"]],
        outputs: Sequence[Float[Tensor, "samples outputs"]],
        inside: Bool[Tensor, "samples taps"] | None = None,
    ) -> None:
        """Adds a batch of which inputs and outputs come in parts, one after the other; `inside` as for `Gram.add`."""
        ones = torch.ones(len(inputs[0]), 1, dtype=inputs[0].dtype)
        rows, results = torch.cat([*inputs, ones], 1), torch.cat([*outputs, ones], 1)
        if not self._gram.columns:
            width, height = rows.shape[1], results.shape[1]
            self._gram, self._square = Gram(width), Gram(height)
            self._cross = torch.zeros(width, height, dtype=torch.float64)
        self._gram.add(rows, inside)
        self._cross += rows.T @ results
        self._square.add(results)

    def towards(
        self, goals: Float[Tensor, "outputs goals"], pull: float | None = None
    ) -> tuple[Float[Tensor, "inputs inputs"], Float[Tensor, "inputs goals"], float]:
        """Returns the products of a regression of some goals, sums of outputs, and the goals' length.

        Args:
            goals: The goals.
            pull: Of the regression, if another than that of all.
        """
        gram, cross, square = self._gram.whole(), self._cross.clone(), self._square.whole()
        count, totals, heights = float(gram[-1, -1]), gram[-1, :-1], square[-1, :-1]
        gram, cross, square = gram[:-1, :-1], cross[:-1, :-1], square[:-1, :-1]
        if self.has_shift:
            means = totals / count, heights / count
            gram = centred(gram, (totals, totals), (means[0], means[0]), count)
            cross = centred(cross, (totals, heights), means, count)
            square = centred(square, (heights, heights), (means[1], means[1]), count)
        pull = self.pull if pull is None else pull
        gram.diagonal().add_(pull * gram.diagonal().mean() + torch.finfo(torch.float64).tiny)
        goals = goals.double()
        size = float(((square @ goals) * goals).sum().clamp_min(torch.finfo(torch.float64).tiny))
        return gram, cross @ goals, size**0.5


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
        # Of what was dropped the number is -1 until the matrices are made smaller.
        self.neurons, self.made = neurons.clone(), None if made is None else made.clone()
        self.taps = len(gram) // len(neurons)
        inverse = inverse_of(gram)
        del gram
        # In units of the goals' length, so that losses of several maps can be added.
        self.weights = inverse @ cross / self.length
        count = len(neurons)
        places = torch.arange(count)
        self._blocks = inverse.reshape(count, self.taps, count, self.taps)[places, :, places, :]
        self._hold(inverse, _TOGETHER)

    def _hold(self, inverse: Float[Tensor, "inputs inputs"], most: int) -> None:
        """Takes over an inverse in force, with room for changes by `most` inputs."""
        self.inverse, self._updates, self._width = inverse, inverse.new_empty(len(inverse), most), 0

    def released(self) -> Regression:
        """Returns itself, without what only further drops need."""
        self._hold(self.inverse.new_empty(0, 0), 0)
        return self

    def losses(self) -> Float[Tensor, " neuron"]:
        """Returns what the squared error grows by without each neuron, as a share of the goals."""
        weights = self.weights.reshape(len(self.neurons), self.taps, -1)
        solved = torch.linalg.solve(self._blocks, weights @ weights.mT)
        return solved.diagonal(dim1=1, dim2=2).sum(1)

    def drop(self, neurons: Int[Tensor, " dropped"]) -> bool:
        """Takes neurons out, and returns whether the map reads or makes any of them."""
        is_less = False
        if self.made is not None:
            is_gone = torch.isin(self.made, neurons)
            is_less = bool(is_gone.any())
            if is_less:
                self.weights[:, is_gone] = 0
                self.made[is_gone] = -1
        is_gone = torch.isin(self.neurons, neurons)
        if not bool(is_gone.any()):
            return is_less
        if self._width + int(is_gone.sum()) * self.taps > self._updates.shape[1]:
            self._settle(int(is_gone.sum()) * self.taps)
            is_gone = torch.isin(self.neurons, neurons)
        self._take_out(is_gone)
        self.neurons[is_gone] = -1
        # A loss of nothing, of which no block is singular.
        self._blocks[is_gone] = torch.eye(self.taps, dtype=self._blocks.dtype)
        return True

    def _take_out(self, is_gone: Bool[Tensor, " neuron"]) -> None:
        """Takes neurons out of the weights, and notes what that does to the inverse, which is changed by many at once.

        A change is the product of a narrow matrix with itself; reading and writing the whole inverse takes longer than
        to multiply it.
        """
        gone = self._columns(is_gone.nonzero()[:, 0])
        noted = self._updates[:, : self._width]
        outer = self.inverse[gone].T - noted @ noted[gone].T
        factor = torch.linalg.cholesky(outer[gone])
        outer[self._columns((self.neurons < 0).nonzero()[:, 0])] = 0
        update = torch.linalg.solve_triangular(factor, outer.T, upper=False).T
        self.weights -= update @ torch.linalg.solve_triangular(factor, self.weights[gone], upper=False)
        self.weights[gone] = 0
        rows = update.reshape(len(self.neurons), self.taps, -1)
        self._blocks -= rows @ rows.mT
        self._updates[:, self._width : self._width + len(gone)] = update
        self._width += len(gone)

    def _settle(self, least: int) -> None:
        """Changes the inverse as was noted, and lets go of what was dropped; makes room for `least` inputs."""
        noted = self._updates[:, : self._width]
        self.inverse.addmm_(noted, noted.T, alpha=-1)
        is_left = self.neurons >= 0
        inverse = self.inverse
        if int(is_left.sum()) < _FULL * len(is_left):
            columns = self._columns(is_left.nonzero()[:, 0])
            inverse, self.weights = inverse[columns][:, columns], self.weights[columns]
            self.neurons, self._blocks = self.neurons[is_left], self._blocks[is_left]
            if self.made is not None:
                self.weights, self.made = self.weights[:, self.made >= 0], self.made[self.made >= 0]
        self._hold(inverse, max(_TOGETHER, least))

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
    pace: int = 1,
) -> dict[str, Int[Tensor, " kept"]]:
    """Returns the neurons of each group that are left when all that are too many are dropped, the least needed first.

    A neuron's loss is that of all regressions together (backward elimination; for groups of weights as in optimal
    brain surgery, NeurIPS 1992).

    Args:
        regressions: Of the maps that read the groups; they are changed.
        places: Group → the numbers of its neurons in each source.
        sizes: Group → how many of its neurons are kept.
        progress: Told the neurons dropped, those to be dropped, and what is done.
        pace: How many times as many neurons are dropped at once.
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
        most = max(1, (sum(map(len, places[group])) - sizes[group]) * pace // _STEPS)
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
        is_left = regression.neurons >= 0
        total.index_add_(0, regression.neurons[is_left], loss[is_left])
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
