"""What networks predict, without labels: the probabilities of classes, and what those of several sources differ by."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

# Sources that saw the same data differ here and there, and are not sure there; sources that saw different data are sure
# of different classes. Of the pairs that were looked at the first have less than 0.33, the second more than 0.46.
_LEAST_CERTAIN_DIFFERENCE = 0.4
# Networks that hardly learned anything differ always in the same direction, and are sure of nothing.
_LEAST_CERTAINTY = 0.6
# Fewer predictions that differ, as a share of all and as a number, say nothing.
_LEAST_SHARE, _LEAST_COUNT = 0.03, 20
_LEAST_CLASSES = 3
_ROUNDING = 1e-3


class Aim(enum.Enum):
    """What the results of a fused network are brought near to: the ensemble of its sources, by outputs or as classes.

    Attributes:
        OUTPUTS: The weighted mean of their outputs.
        PROBABILITIES: The weighted mean of the probabilities that they give each class.

    Example:
        >>> [aim.value for aim in Aim]
        ['outputs', 'probabilities']
    """

    OUTPUTS = "outputs"
    PROBABILITIES = "probabilities"


def axis_of_classes(shape: Sequence[int], inputs: Sequence[Tensor]) -> int:
    """Returns on which axis of a model's outputs classes stand.

    It is the last one where there is a prediction for each token or step of an input (`evaluate` decides by targets,
    which have that shape); otherwise, as in torch's losses, axis 1.

    Args:
        shape: Of the outputs.
        inputs: What the model was given: tokens are whole numbers, steps have features on a last axis.

    Example:
        >>> axis_of_classes((8, 12, 50), [torch.zeros(8, 12).long()]), axis_of_classes((8, 10), [torch.zeros(8, 3)])
        (-1, 1)
    """
    for each in inputs:
        is_of_tokens = not each.is_floating_point() and tuple(each.shape) == tuple(shape[:-1])
        is_of_steps = len(shape) == each.ndim == 3 and tuple(each.shape[:2]) == tuple(shape[:2])
        # What keeps places on the other axes, as a convolution does, has its channels on axis 1.
        if is_of_tokens or (is_of_steps and each.shape[2] != shape[2]):
            return -1
    return 1


def probabilities_of(outputs: Float[Tensor, ...], axis: int) -> Float[Tensor, "predictions classes"]:
    """Returns the probabilities that outputs give each class, a row per prediction, in float64.

    Args:
        outputs: Probabilities as they are, or logits, of which log-probabilities are a case.
        axis: Where the classes stand.

    Example:
        >>> probabilities_of(torch.tensor([[0.25, 0.75], [0.5, 0.5]]), 1).tolist()
        [[0.25, 0.75], [0.5, 0.5]]
        >>> probabilities_of(torch.zeros(1, 4), 1).tolist()
        [[0.25, 0.25, 0.25, 0.25]]
    """
    rows = outputs.double().movedim(axis, -1).reshape(-1, outputs.shape[axis])
    is_of_probabilities = bool((rows >= 0).all()) and bool(((rows.sum(1) - 1).abs() <= _ROUNDING).all())
    return rows if is_of_probabilities else rows.softmax(1)


class Disagreement:
    """What the predictions of several sources differ by, added up batch by batch.

    Args:
        sources: How many there are.

    Example:
        Two sources of which each is sure of classes of its own:

        >>> logits = [torch.tensor([[9.0, 0.0, 0.0]] * 50), torch.tensor([[0.0, 0.0, 9.0]] * 50)]
        >>> found = Disagreement(2)
        >>> found.add([probabilities_of(each, 1) for each in logits])
        >>> round(found.share, 2), round(found.systematic, 2), found.saw_different_things
        (1.0, 1.0, True)
    """

    def __init__(self, sources: int) -> None:
        self.count = self.classes = 0
        self._pairs = list(itertools.combinations(range(sources), 2))
        self._differing = self._distance = 0.0
        self._sums: list[Tensor | float] = [0.0] * len(self._pairs)
        self._tops = [0.0] * sources

    def add(self, probabilities: Sequence[Float[Tensor, "predictions classes"]]) -> None:
        """Adds the predictions of every source for the same inputs."""
        first = probabilities[0]
        self.count += len(first)
        self.classes = first.shape[1]
        answers = [each.argmax(1) for each in probabilities]
        for source, each in enumerate(probabilities):
            self._tops[source] += float(each.max(1).values.sum())
        for number, (one, other) in enumerate(self._pairs):
            difference = probabilities[one] - probabilities[other]
            self._differing += int((answers[one] != answers[other]).sum())
            self._distance += float(difference.abs().sum())
            self._sums[number] = self._sums[number] + difference.sum(0)

    @property
    def share(self) -> float:
        """Share of the inputs for which two sources have different answers, in the mean of all pairs."""
        return self._differing / max(self.count * len(self._pairs), 1)

    @property
    def systematic(self) -> float:
        """How much of the differences between probabilities is left in their mean over all inputs, from 0 to 1."""
        left = sum(float(total.abs().sum()) for total in self._sums if isinstance(total, Tensor))
        return left / self._distance if self._distance else 0.0

    @property
    def certainty(self) -> float:
        """Mean probability of the answers of the least certain source, from 0 (chance) to 1."""
        chance = 1 / max(self.classes, 2)
        return max(0.0, min(self._tops) / max(self.count, 1) - chance) / (1 - chance)

    @property
    def saw_different_things(self) -> bool:
        """Whether the sources answer differently, surely, and always in the same direction: their data differed."""
        return (
            self.classes >= _LEAST_CLASSES
            and self.share >= _LEAST_SHARE
            and self.share * self.count >= _LEAST_COUNT
            and self.certainty >= _LEAST_CERTAINTY
            and self.systematic * self.certainty >= _LEAST_CERTAIN_DIFFERENCE
        )


class Divergence:
    """How far predictions are from those of an ensemble, added up batch by batch.

    Attributes:
        count: How many predictions were added.
        by_sample: The mean divergence of each sample, a tensor for each batch.

    Example:
        >>> found = Divergence()
        >>> found.add(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.5, 0.5]]))
        >>> found.divergence, found.agreement
        (0.0, 100.0)
    """

    def __init__(self) -> None:
        self.count, self._total, self._equal = 0, 0.0, 0
        self.by_sample: list[Tensor] = []

    def add(
        self, own: Float[Tensor, "predictions classes"], goal: Float[Tensor, "predictions classes"], samples: int = 1
    ) -> None:
        """Adds probabilities of a network and those of the ensemble, of so many samples with equally many each."""
        tiny = torch.finfo(torch.float64).tiny
        self.count += len(goal)
        missed = (goal * (goal.clamp_min(tiny).log() - own.clamp_min(tiny).log())).sum(1)
        self._total += float(missed.sum())
        self.by_sample.append(missed.reshape(samples, -1).mean(1))
        self._equal += int((own.argmax(1) == goal.argmax(1)).sum())

    @property
    def divergence(self) -> float:
        """Mean Kullback-Leibler divergence of the network's probabilities from the ensemble's, in nats."""
        return max(0.0, self._total / max(self.count, 1))

    @property
    def agreement(self) -> float:
        """Percent of the inputs for which both have the same answer."""
        return 100 * self._equal / max(self.count, 1)


def mean_probabilities(
    probabilities: Sequence[Float[Tensor, "predictions classes"]], model_weights: Iterable[float]
) -> Float[Tensor, "predictions classes"]:
    """Returns the weighted mean of the probabilities of several sources.

    Example:
        >>> mean_probabilities([torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])], (0.75, 0.25)).tolist()
        [[0.75, 0.25]]
    """
    return torch.stack([weight * each for weight, each in zip(model_weights, probabilities, strict=True)]).sum(0)


def ensemble_outputs(
    outputs: Sequence[Float[Tensor, ...]], model_weights: Sequence[float], like: Float[Tensor, ...]
) -> Float[Tensor, ...] | None:
    """Returns what the sources make together, as the fused network makes it.

    It is the mean; where the fused network has the heads of all, their outputs beside each other; where it keeps one
    head, the mean over the sources with as many outputs, None where no source has.

    Args:
        outputs: Of each source, one tensor.
        model_weights: One per source.
        like: What the fused network makes.

    Example:
        >>> zeros, ones = torch.zeros(1, 2), torch.ones(1, 2)
        >>> ensemble_outputs([zeros, ones], (0.25, 0.75), zeros).tolist()
        [[0.75, 0.75]]
        >>> ensemble_outputs([zeros, ones], (0.25, 0.75), torch.zeros(1, 4)).tolist()
        [[0.0, 0.0, 1.0, 1.0]]
    """
    alike = [(weight, each) for weight, each in zip(model_weights, outputs, strict=True) if each.shape == like.shape]
    if len(alike) == len(outputs):
        return torch.stack([weight * each for weight, each in alike]).sum(0)
    for axis in range(like.ndim):
        others = [[*each.shape[:axis], *each.shape[axis + 1 :]] for each in (like, *outputs)]
        if all(each == others[0] for each in others) and sum(x.shape[axis] for x in outputs) == like.shape[axis]:
            return torch.cat(list(outputs), axis)
    total = sum(weight for weight, _ in alike)
    return torch.stack([weight / total * each for weight, each in alike]).sum(0) if total > 0 else None
