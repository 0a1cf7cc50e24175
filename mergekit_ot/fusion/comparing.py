"""Networks beside the ensemble of the sources, on inputs that nothing was fitted to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergekit_ot.fusion.comparison import Closeness, Distance, RepairComparison
from mergekit_ot.fusion.predictions import (
    Aim,
    Disagreement,
    Divergence,
    axis_of_classes,
    ensemble_outputs,
    mean_probabilities,
    probabilities_of,
)
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.graph.capture.outputs import outputs_of

# So many inputs that all are of one class say something about the data.
_TELLING = 20
# Sources whose answers have that probability, in the mean, are taken for classifiers: numbers that are no logits have
# answers hardly above chance.
_LEAST_CERTAINTY = 0.5
# So many standard errors are no chance.
_SURE = 2.0


class _Outputs:
    """Sums over batches of a network's outputs and the ensemble's, from which distances follow."""

    def __init__(self) -> None:
        self.missed = self.own = self.shared = self.goal = 0.0
        self.by_sample: list[Tensor] = []

    def add(self, own: Float[Tensor, ...], goal: Float[Tensor, ...]) -> None:
        squares = (own - goal).square()
        self.missed += float(squares.sum())
        self.by_sample.append(squares.reshape(len(squares), -1).sum(1) if squares.ndim else squares.reshape(1))
        axis = _class_axis(goal)
        if axis is not None:
            own, goal = own - own.mean(axis, keepdim=True), goal - goal.mean(axis, keepdim=True)
        self.own += float(own.square().sum())
        self.shared += float((own * goal).sum())
        self.goal += float(goal.square().sum())

    def distance(self, variation: float) -> Distance:
        """Returns the distances of what was added; `variation` is how much the ensemble's outputs vary."""
        tiny = torch.finfo(torch.float64).tiny
        agreed = max(self.shared, 0.0) ** 2 / max(self.own, tiny)
        return Distance(self.missed / max(variation, tiny), max(0.0, self.goal - agreed) / max(self.goal, tiny))


def compare_repair(
    name: str,
    states: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    target: SourceModel,
    sources: Sequence[SourceModel],
    model_weights: Sequence[float],
    held_out: Iterable[tuple[Tensor, ...]],
    aim: Aim = Aim.OUTPUTS,
    mean: Mapping[str, Tensor] | None = None,
) -> RepairComparison | None:
    """Compares a fused network with and without a repair; None where it has no outputs that are numbers.

    Args:
        name: Of the repair.
        states: Of the fused network, repaired and not.
        target: Its architecture.
        sources: The sources, whose weighted mean output is the ensemble's.
        model_weights: One per source.
        held_out: Inputs that nothing was fitted to.
        aim: What the repair brings the results near to.
        mean: The mean of the sources' weights, neurons taken as they stand.
    """
    models = _networks(states, target, sources, mean)
    own_places = slice(2, 2 + len(sources))
    sums: list[_Outputs] = [_Outputs() for _ in models]
    spread = _Spread()
    predictions = _Predictions(model_weights, len(models))
    classes: set[int] = set()
    for inputs in held_out:
        outputs = _outputs_of_all(models, inputs)
        predictions.add(outputs, inputs)
        for place in range(len(outputs[0])):
            each = [of_model[place] for of_model in outputs]
            goal = ensemble_outputs(each[own_places], model_weights, each[0])
            if goal is None:
                return None
            # Heads of other sizes than the fused one's are no results to compare it with.
            sums = sums if all(of_source.shape == goal.shape for of_source in each[2:]) else sums[:2]
            each = each[: len(sums)]
            spread.add(place, goal)
            for of_model, own in zip(sums, each, strict=True):
                of_model.add(own, goal)
            classes.update(goal.argmax(1).unique().tolist() if goal.ndim == 2 and goal.shape[1] > 2 else (0, 1))
    if not spread.count:
        return None
    distances = [of_model.distance(spread.variation) for of_model in sums]
    of_predictions = predictions.found(aim)
    of_each = predictions.sums if of_predictions else sums
    samples = [torch.cat(each.by_sample) for each in of_each]
    of_sources, of_mean = samples[own_places], samples[own_places.stop :]
    has_mean = bool(of_mean)
    return RepairComparison(
        repair=name,
        held_out=spread.count,
        repaired=distances[0],
        unrepaired=distances[1],
        sources=tuple(distances[own_places]),
        is_one_sided=len(classes) == 1 and spread.count >= _TELLING,
        aim=aim,
        predictions=of_predictions[: own_places.stop],
        nearer_sources=(_nearest(of_sources, samples[0]), _nearest(of_sources, samples[1])),
        mean=distances[own_places.stop] if has_mean else None,
        prediction_of_mean=of_predictions[own_places.stop] if has_mean and of_predictions else None,
        is_mean_nearer=(
            has_mean and _is_surely_nearer(of_mean[0], samples[0]),
            has_mean and _is_surely_nearer(of_mean[0], samples[1]),
        ),
    )


def _networks(
    states: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    target: SourceModel,
    sources: Sequence[SourceModel],
    mean: Mapping[str, Tensor] | None,
) -> list[nn.Module]:
    """Returns the repaired network, the unrepaired one, the sources and the mean; the first two may be one."""
    unrepaired = target.instance(states[1])
    repaired = unrepaired if states[0] is states[1] else target.instance(states[0])
    of_mean = [] if mean is None else [target.instance(mean)]
    return [repaired, unrepaired, *(source.instance() for source in sources), *of_mean]


def _outputs_of_all(models: Sequence[nn.Module], inputs: tuple[Tensor, ...]) -> list[list[Tensor]]:
    known: dict[int, list[Tensor]] = {}
    for model in models:
        if id(model) not in known:
            known[id(model)] = outputs_of(model, inputs)
    return [known[id(model)] for model in models]


def _nearest(sources: Sequence[Float[Tensor, " n"]], result: Float[Tensor, " n"]) -> int | None:
    """Returns the place of the source with the least mean distance, where it is surely less than the result's.

    Args:
        sources: Distance of each source from the ensemble, sample by sample.
        result: That of the result.
    """
    if len(sources) < 2:
        return None
    nearest = min(range(len(sources)), key=lambda number: float(sources[number].mean()))
    return nearest if _is_surely_nearer(sources[nearest], result) else None


def _is_surely_nearer(one: Float[Tensor, " n"], other: Float[Tensor, " n"]) -> bool:
    """Whether the mean of some distances is less than that of others by more than two standard errors."""
    if len(other) < _TELLING:
        return False
    gains = other - one
    return float(gains.mean()) > _SURE * float(gains.std()) / len(gains) ** 0.5


class _Predictions:
    """Predictions of networks beside those of the ensemble, where all hand out one tensor with an axis of classes.

    The first two networks are the fused one with and without the repair, the next ones the sources.

    Args:
        model_weights: One per source.
        count: How many networks there are.
    """

    def __init__(self, model_weights: Sequence[float], count: int) -> None:
        self.model_weights = model_weights
        self.of_sources = slice(2, 2 + len(model_weights))
        self.between = Disagreement(len(model_weights))
        self.sums = [Divergence() for _ in range(count)]
        self.are_classes, self.are_of_steps = True, False

    def add(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor]) -> None:
        self.are_classes &= all(len(each) == 1 and each[0].ndim >= 2 and each[0].isfinite().all() for each in outputs)
        if not self.are_classes:
            return
        axis = axis_of_classes(outputs[0][0].shape, inputs)
        self.are_classes &= outputs[0][0].shape[axis] > 1
        # Heads of several sizes give other classes.
        self.are_classes &= all(of_model[0].shape == outputs[0][0].shape for of_model in outputs)
        self.are_of_steps |= axis == -1
        if not self.are_classes:
            return
        each = [probabilities_of(of_model, axis) for (of_model,) in outputs]
        self.between.add(each[self.of_sources])
        goal = mean_probabilities(each[self.of_sources], self.model_weights)
        for total, own in zip(self.sums, each, strict=True):
            total.add(own, goal, len(outputs[0][0]))

    def found(self, aim: Aim) -> tuple[Closeness, ...]:
        """Returns how near each is; nothing where the outputs do not look like classes."""
        # What is predicted for each token is a token, however unsure.
        is_certain = self.are_of_steps or self.between.certainty >= _LEAST_CERTAINTY
        if not self.are_classes or not (is_certain or aim is Aim.PROBABILITIES):
            return ()
        return tuple(Closeness(total.divergence, total.agreement) for total in self.sums)


class _Spread:
    """How much the ensemble's outputs vary from sample to sample."""

    def __init__(self) -> None:
        self.count = 0
        self.squares: dict[int, float] = {}
        self.totals: dict[int, Tensor] = {}

    def add(self, place: int, goal: Tensor) -> None:
        self.count += len(goal) if place == 0 and goal.ndim else 0
        self.squares[place] = self.squares.get(place, 0.0) + float(goal.square().sum())
        self.totals[place] = self.totals.get(place, 0) + goal.sum(0)

    @property
    def variation(self) -> float:
        """The sum of squares around the mean over the samples, of all outputs; of the outputs where none varies."""
        whole = sum(self.squares.values())
        around = whole - sum(float(total.square().sum()) / self.count for total in self.totals.values())
        return around if around > 1e-9 * whole else whole


def _class_axis(outputs: Tensor) -> int | None:
    """Returns along which axis classes stand: the second of two, or the one along which probabilities sum to one."""
    if outputs.ndim < 2:
        return None
    if outputs.ndim == 2:
        return 1 if outputs.shape[1] > 1 else None
    for axis in (outputs.ndim - 1, 1):
        # A mean of logarithms sums to no more than one.
        total = outputs.exp().sum(axis)
        if outputs.shape[axis] > 1 and bool(outputs.max() <= 1e-6) and bool((total <= 1 + 1e-3).all()):
            return axis
    return None
