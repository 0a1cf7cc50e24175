"""What a refit may return: neurons of all sources, or those of one source; and which is nearest to the ensemble.

The choice of neurons is greedy, and adds up what the readers of each layer lose as if all before were exact. Where
a narrow stream runs through many layers it ends far from the least of its own sum, which is often one source's neurons
and no others. So these are tried beside it, and inputs that nothing was fitted to decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot import (
    Aim,
    DataError,
    Disagreement,
    Divergence,
    RepairContext,
    axis_of_classes,
    mean_probabilities,
    outputs_of,
    probabilities_of,
)

# One batch in so many is held back from the fits, where there are so many.
_HELD_BACK, _LEAST_BATCHES = 10, 8
MIXED, SINGLE = "mixed", "single"
_Fit = Callable[[RepairContext], dict[str, Tensor]]
# Networks whose answers have that probability, in the mean, are classifiers: other numbers have answers at chance.
_LEAST_CERTAINTY = 0.5
# So many standard errors are no chance, of so many samples.
_SURE, _LEAST_SAMPLES = 2.0, 20


def parted(context: RepairContext) -> tuple[RepairContext, list[tuple[Tensor, ...]]]:
    """Returns the context with the batches to be fitted to, and batches that are held back; none of few.

    Example:
        Of twenty batches, two are held back:

        >>> from torch import nn
        >>> from mergekit_ot import fuse
        >>> net, inputs = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4)
        >>> result = fuse([net, net], example_inputs=inputs)
        >>> fitted, held_back = parted(result.repair_context(result.state, (0.5, 0.5), [(inputs,)] * 20))
        >>> len(list(fitted.batches)), len(held_back)
        (18, 2)
    """
    batches = list(context.batches)
    if len(batches) < _LEAST_BATCHES:
        return context, []
    # Those in the middle of each ten: a sorted data set begins and ends with the odd ones.
    places = set(range(min(_HELD_BACK, len(batches)) // 2, len(batches), _HELD_BACK))
    fitted = [batch for place, batch in enumerate(batches) if place not in places]
    return replace(context, batches=fitted), [batches[place] for place in sorted(places)]


def sources_to_try(context: RepairContext, neurons: str, is_choice: bool) -> list[int]:
    """Returns the numbers of the sources that are tried as a whole.

    Args:
        context: Of the repair.
        neurons: What the user wants: neurons of one source, of all, or what is nearest.
        is_choice: Whether all that the sources do not share is chosen or averaged, neuron by neuron.

    Raises:
        DataError: One source's are wanted, and none is a state of the fused network.
    """
    used = [number for number, share in enumerate(context.model_weights) if share > 0]
    if neurons == MIXED or len(used) < 2 or not (is_choice or neurons == SINGLE):
        return []
    shapes = {name: value.shape for name, value in context.fused.items()}
    states = [context.sources[number].state for number in used]
    is_whole = all({name: value.shape for name, value in state.items()} == shapes for state in states)
    # What the user keeps from a source, or from each, is put back afterwards, in the order of the fused network.
    if is_whole and not context.kept and not context.joined:
        return used
    if neurons == SINGLE:
        raise DataError(
            "Option neurons=single of repair 'refit' takes one source as a whole, which needs sources of the fused "
            "network's shapes and none of their parameters kept. Take neurons=mixed."
        )
    return []


class Nearness:
    """How near networks are to the ensemble of the sources, on some batches.

    Of classifiers, it is the mean Kullback-Leibler divergence from the mean of their probabilities; of others the mean
    squared error from the mean of their outputs.

    Args:
        context: Of the repair.
        batches: That nothing was fitted to.
    """

    def __init__(self, context: RepairContext, batches: Iterable[tuple[Tensor, ...]]) -> None:
        self.context, self.batches = context, list(batches)
        self.used = [number for number, share in enumerate(context.model_weights) if share > 0]
        self.shares = [context.model_weights[number] for number in self.used]
        states = [context.sources[number].state for number in self.used]
        models = [context.instance(state) for state in states]
        self._of_sources = [[outputs_of(model, batch) for model in models] for batch in self.batches]
        self._is_of_classes = self._are_classes()

    def of(self, state: Mapping[str, Tensor]) -> Float[Tensor, " samples"]:
        """Returns how far a state of the fused architecture is, sample by sample."""
        model = self.context.instance(state)
        return self._distances([outputs_of(model, batch) for batch in self.batches])

    def of_source(self, number: int) -> Float[Tensor, " samples"]:
        """Returns how far a source is, sample by sample."""
        place = self.used.index(number)
        return self._distances([of_batch[place] for of_batch in self._of_sources])

    @property
    def name(self) -> str:
        """What the distance is."""
        return "mean Kullback-Leibler divergence" if self._is_of_classes else "mean squared error"

    def _are_classes(self) -> bool:
        between = Disagreement(len(self.used))
        is_of_steps = True
        for of_sources, batch in zip(self._of_sources, self.batches, strict=True):
            if any(len(each) != 1 or each[0].ndim < 2 for each in of_sources):
                return False
            shape = of_sources[0][0].shape
            axis = axis_of_classes(shape, batch)
            if shape[axis] < 2:
                return False
            is_of_steps &= axis == -1
            between.add([probabilities_of(each[0], axis) for each in of_sources])
        is_certain = is_of_steps or between.certainty >= _LEAST_CERTAINTY
        return is_certain or self.context.aim is Aim.PROBABILITIES

    def _distances(self, outputs: Sequence[Sequence[Tensor]]) -> Float[Tensor, " samples"]:
        measured = self._divergences if self._is_of_classes else self._squared_errors
        return measured(outputs)

    def _divergences(self, outputs: Sequence[Sequence[Tensor]]) -> Float[Tensor, " samples"]:
        total = Divergence()
        for (own,), of_sources, batch in zip(outputs, self._of_sources, self.batches, strict=True):
            axis = axis_of_classes(own.shape, batch)
            each = [probabilities_of(of_source[0], axis) for of_source in of_sources]
            total.add(probabilities_of(own, axis), mean_probabilities(each, self.shares), len(own))
        return torch.cat(total.by_sample)

    def _squared_errors(self, outputs: Sequence[Sequence[Tensor]]) -> Float[Tensor, " samples"]:
        by_batch = []
        for own, of_sources in zip(outputs, self._of_sources, strict=True):
            missed, numbers = torch.zeros(len(own[0]), dtype=torch.float64), 0
            for place, value in enumerate(own):
                each = [share * of_source[place] for share, of_source in zip(self.shares, of_sources, strict=True)]
                errors = (value - torch.stack(each).sum(0)).square().reshape(len(missed), -1)
                missed, numbers = missed + errors.sum(1), numbers + errors.shape[1]
            by_batch.append(missed / max(numbers, 1))
        return torch.cat(by_batch)


def surely_nearer(one: Float[Tensor, " samples"], other: Float[Tensor, " samples"]) -> bool:
    """Returns whether distances are smaller than others, in the mean, by more than chance.

    Example:
        >>> other = torch.arange(20.0)
        >>> surely_nearer(other - 0.5, other), surely_nearer(other, other)
        (True, False)
        >>> surely_nearer(other - torch.tensor([9.0, -8.0]).repeat(10), other)
        False
    """
    gains = other - one
    if len(gains) < _LEAST_SAMPLES:
        return False
    return float(gains.mean()) > _SURE * float(gains.std(correction=0)) / len(gains) ** 0.5


@dataclass(frozen=True)
class _Candidate:
    """A state that a refit may return, how far it is from the ensemble, and what the user is told of it."""

    state: dict[str, Tensor]
    distances: Float[Tensor, " samples"]
    notes: tuple[str, ...]

    @property
    def distance(self) -> float:
        return float(self.distances.mean())


class Candidates:
    """States that a refit may return, of which it returns the nearest to the ensemble.

    Args:
        context: Of the repair, with the batches to be fitted to.
        nearness: On batches that are not fitted to.
    """

    def __init__(self, context: RepairContext, nearness: Nearness) -> None:
        self.context, self.nearness = context, nearness
        self._found: list[_Candidate] = []

    def add_mixed(self, fit: _Fit) -> None:
        """Adds the network of neurons of all sources that `fit` makes of the context."""
        self._add(fit, self.context)

    def add_nearest_of(self, sources: Sequence[int], fit_results: _Fit, is_tried: bool = False) -> None:
        """Adds the source that is nearest to the ensemble, if it is surely nearer than what there is.

        It is added as it is, and with the results that `fit_results` makes of a context whose fused state it is.

        Args:
            sources: Numbers of the sources that may be added.
            fit_results: Fits the maps that make the results.
            is_tried: Whether the nearest is added in any case: fitted results may bring it nearer by much.
        """
        distances = {number: self.nearness.of_source(number) for number in sources}
        nearest = min(sources, key=lambda number: float(distances[number].mean()))
        distance = float(distances[nearest].mean())
        if self._found and not (is_tried or surely_nearer(distances[nearest], self._found[0].distances)):
            return
        state = {name: value.clone() for name, value in self.context.sources[nearest].state.items()}
        whole = f"Refit took over all neurons of source {nearest + 1} and none of another"
        if self._found:
            mixed = f"{self._found[0].distance:.4f} for chosen neurons of all sources"
            far = f"{self.nearness.name} {distance:.4f} before any fit, {mixed}"
            whole += f", which is nearer to the ensemble on calibration inputs that were held back ({far})"
        self._found.append(_Candidate(state, distances[nearest], (f"{whole}; nothing was fitted.",)))
        self._add(fit_results, replace(self.context, fused=state), f"{whole}; its results were fitted to the ensemble.")

    def nearest(self) -> dict[str, Tensor]:
        """Returns the nearest state, and tells the user of it; of equal ones that which was added first."""
        chosen = min(self._found, key=lambda candidate: candidate.distance)
        if self.context.note is not None:
            for note in chosen.notes:
                self.context.note(note)
        return chosen.state

    def _add(self, fit: _Fit, context: RepairContext, *told: str) -> None:
        notes: list[str] = []
        state = fit(replace(context, note=notes.append))
        self._found.append(_Candidate(state, self.nearness.of(state), (*told, *notes)))
