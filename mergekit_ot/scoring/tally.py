"""What a model scores on data, added up batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from mergekit_ot.errors import DataError
from mergekit_ot.scoring.batches import IGNORED
from mergekit_ot.scoring.metrics import Measured, Metric, flat_classes

# Above it the exponential overflows.
_LARGEST_EXPONENT = 709.0


@dataclass(frozen=True)
class Evaluation:
    """What a model scores on data.

    Attributes:
        loss: Mean cross-entropy (the same for logits and log-softmax outputs); mean squared error for float targets.
        accuracy: Percent of targets that are the most likely class; None for float targets.
        count: Number of targets; those of −100 do not count.
        is_of_tokens: Whether the targets are tokens: whole numbers, one per position of a sequence.
        metrics: What was measured besides, by name.

    Example:
        >>> import torch
        >>> from mergekit_ot import evaluate
        >>> evaluate(nn.Identity(), [(torch.zeros(4, 2), torch.zeros(4, 2))])
        Evaluation(loss=0.0, accuracy=None, count=4, is_of_tokens=False)
    """

    loss: float
    accuracy: float | None
    count: int
    is_of_tokens: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict, repr=False)

    @property
    def perplexity(self) -> float | None:
        """The exponential of the mean cross-entropy; None where the targets are no tokens.

        Example:
            >>> import torch
            >>> from mergekit_ot import evaluate
            >>> even, tokens = nn.Embedding.from_pretrained(torch.zeros(8, 8)), torch.ones(2, 3).long()
            >>> round(evaluate(even, [(tokens, tokens)]).perplexity or 0, 3)
            8.0
        """
        if not self.is_of_tokens:
            return None
        return math.exp(self.loss) if self.loss < _LARGEST_EXPONENT else math.inf + self.loss

    def as_json(self) -> dict[str, float | None]:
        """Returns the scores by name, metrics besides included; the perplexity is there for tokens only."""
        scores = {"loss": self.loss, "accuracy": self.accuracy, "perplexity": self.perplexity, "count": self.count}
        own = {name: score for name, score in scores.items() if name != "perplexity" or self.is_of_tokens}
        return {**own, **{f"metric_{name}" if name in scores else name: score for name, score in self.metrics.items()}}


@dataclass
class Tally:
    """Sums over the batches seen so far."""

    loss: float = 0.0
    correct: int = 0
    count: int = 0
    is_classification: bool = True
    is_of_tokens: bool = True
    measured: Sequence[Measured] = ()
    is_seen: bool = False

    @classmethod
    def of(cls, metrics: Sequence[Metric]) -> Tally:
        """Returns an empty tally that measures these besides."""
        return cls(measured=[Measured(metric) for metric in metrics])

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Adds a batch of outputs.

        Raises:
            DataError: Targets do not fit the outputs.
        """
        self.is_seen = True
        self._add(outputs, targets)
        if self.measured:
            given = outputs.cpu(), targets.cpu()
            for metric in self.measured:
                metric.add(*given)

    def _add(self, outputs: Tensor, targets: Tensor) -> None:
        if targets.is_floating_point():
            self.is_classification = self.is_of_tokens = False
            if outputs.shape != targets.shape and outputs.numel() == targets.numel():
                outputs = outputs.reshape(targets.shape)
            if outputs.shape != targets.shape:
                raise DataError(
                    f"Outputs have shape {tuple(outputs.shape)}, float targets {tuple(targets.shape)}: for a squared "
                    "error they must agree. Class targets must be integers."
                )
            count = targets.shape[0] if targets.dim() else 1
            self.loss += (outputs.double() - targets.double()).square().mean().item() * count
            self.count += count
            return
        self.is_of_tokens &= targets.dim() == 2
        logits, classes = flat_classes(outputs, targets.long())
        self.loss += nn.functional.cross_entropy(logits.double(), classes, reduction="sum", ignore_index=IGNORED).item()
        self.correct += int((logits.argmax(1) == classes).sum())
        self.count += int((classes != IGNORED).sum())

    def result(self) -> Evaluation:
        """Returns the scores.

        Raises:
            DataError: There was no batch, or no target that counts.
        """
        if self.count == 0 and self.is_seen:
            raise DataError("Every target of the data is -100, which counts for nothing: nothing was evaluated.")
        if self.count == 0:
            raise DataError("The data has no batches: nothing was evaluated.")
        accuracy = 100 * self.correct / self.count if self.is_classification else None
        metrics = {metric.name: metric.result() for metric in self.measured}
        return Evaluation(self.loss / self.count, accuracy, self.count, self.is_of_tokens, metrics)
