"""What a model scores on data, added up batch by batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from mergekit_ot.errors import DataError

# Above it the exponential overflows.
_LARGEST_EXPONENT = 709.0


@dataclass(frozen=True)
class Evaluation:
    """What a model scores on data.

    Attributes:
        loss: Mean cross-entropy (the same for logits and log-softmax outputs); mean squared error for float targets.
        accuracy: Percent of targets that are the most likely class; None for float targets.
        count: Number of targets.
        is_of_tokens: Whether the targets are tokens: whole numbers, one per position of a sequence.

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
        """Returns the scores by name; the perplexity is there for tokens only."""
        scores = {"loss": self.loss, "accuracy": self.accuracy, "perplexity": self.perplexity, "count": self.count}
        return {name: score for name, score in scores.items() if name != "perplexity" or self.is_of_tokens}


@dataclass
class Tally:
    """Sums over the batches seen so far."""

    loss: float = 0.0
    correct: int = 0
    count: int = 0
    is_classification: bool = True
    is_of_tokens: bool = True

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Adds a batch of outputs.

        Raises:
            DataError: Targets do not fit the outputs.
        """
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
        logits, classes = _flat_classes(outputs, targets.long())
        self.loss += nn.functional.cross_entropy(logits.double(), classes, reduction="sum").item()
        self.correct += int((logits.argmax(1) == classes).sum())
        self.count += classes.numel()

    def result(self) -> Evaluation:
        """Returns the scores.

        Raises:
            DataError: There was no batch.
        """
        if self.count == 0:
            raise DataError("The data has no batches: nothing was evaluated.")
        accuracy = 100 * self.correct / self.count if self.is_classification else None
        return Evaluation(self.loss / self.count, accuracy, self.count, self.is_of_tokens)


def _flat_classes(outputs: Tensor, targets: Tensor) -> tuple[Float[Tensor, "n classes"], Tensor]:
    """Returns one row of logits per target: classes stand on the last axis or, as in torch's losses, on axis 1."""
    if outputs.dim() == targets.dim() + 1 and outputs.shape[:-1] == targets.shape:
        logits = outputs.reshape(-1, outputs.shape[-1])
    elif outputs.dim() == targets.dim() + 1 and (outputs.shape[0], *outputs.shape[2:]) == tuple(targets.shape):
        logits = outputs.movedim(1, -1).reshape(-1, outputs.shape[1])
    else:
        raise DataError(
            f"Outputs have shape {tuple(outputs.shape)}, class targets {tuple(targets.shape)}: "
            "expected one row of logits per target."
        )
    classes = targets.reshape(-1)
    wrong = classes[(classes < 0) | (classes >= logits.shape[1])]
    if wrong.numel():
        raise DataError(
            f"Target {int(wrong[0])} is no class of a model with {logits.shape[1]} outputs. Check the data's labels."
        )
    return logits, classes
