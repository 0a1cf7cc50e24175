"""Metrics besides loss and accuracy: the share of targets among the k likeliest, or any callable of the user's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, final, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from mergekit_ot.errors import DataError, reason_of
from mergekit_ot.scoring.batches import IGNORED


@runtime_checkable
class Accumulating(Protocol):
    """A metric that is given one batch after the other, as those of torchmetrics are."""

    def update(self, outputs: Any, targets: Any, /) -> Any:
        """Takes a batch."""

    def compute(self) -> Any:
        """Returns the metric over all batches."""


@final
@dataclass(frozen=True)
class Metric:
    """A metric by name.

    Attributes:
        name: In tables and JSON.
        make: Returns a fresh `Accumulating`, or a function of outputs and targets whose batch means are averaged.

    Example:
        >>> import torch
        >>> from mergekit_ot import evaluate
        >>> error = Metric("l1", lambda: lambda outputs, targets: (outputs - targets).abs().mean())
        >>> evaluate(torch.nn.Identity(), [(torch.zeros(4, 2), torch.ones(4, 2))], metrics=[error]).metrics
        {'l1': 1.0}
    """

    name: str
    make: Callable[[], Any]


class Measured:
    """One metric of one network, batch by batch.

    Args:
        metric: What is measured.
    """

    def __init__(self, metric: Metric) -> None:
        self.name = metric.name
        self._made = metric.make()
        self._sum, self._count = 0.0, 0

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Takes a batch.

        Raises:
            DataError: The metric raised, or gave no number.
        """
        try:
            if isinstance(self._made, Accumulating):
                self._made.update(outputs, targets)
                return
            value = float(self._made(outputs, targets))
        except DataError:
            raise
        except Exception as failure:
            shapes = f"outputs {tuple(outputs.shape)}, targets {tuple(targets.shape)}"
            raise DataError(
                f"Metric '{self.name}' raised {reason_of(failure)} on {shapes}. It is called with outputs and targets "
                "of one batch, and gives one number; or it has update(outputs, targets) and compute()."
            ) from failure
        self._sum, self._count = self._sum + value * len(outputs), self._count + len(outputs)

    def result(self) -> float:
        """Returns the metric over all batches.

        Raises:
            DataError: It is no number.
        """
        if not isinstance(self._made, Accumulating):
            return self._sum / self._count if self._count else float("nan")
        try:
            return float(self._made.compute())
        except Exception as failure:
            raise DataError(
                f"compute() of metric '{self.name}' gave no number: {reason_of(failure)}. Choose one that averages "
                "over classes, such as ?average=macro."
            ) from failure


def top(count: int) -> Metric:
    """Returns the metric: percent of targets that are among the `count` likeliest classes.

    Example:
        >>> top(5).name
        'top_5'
    """
    return Metric(f"top_{count}", lambda: _Top(count))


class _Top:
    def __init__(self, count: int) -> None:
        self._count, self._hits, self._all = count, 0, 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        if targets.is_floating_point():
            raise DataError(
                f"Numbers are no classes, and of classes alone {self._count} are likeliest. Leave --top out."
            )
        logits, classes = flat_classes(outputs, targets.long())
        kept = classes != IGNORED
        likeliest = logits.topk(min(self._count, logits.shape[1]), dim=1).indices
        self._hits += int(((likeliest == classes[:, None]).any(1) & kept).sum())
        self._all += int(kept.sum())

    def compute(self) -> float:
        return 100 * self._hits / self._all if self._all else float("nan")


def flat_classes(outputs: Tensor, targets: Tensor) -> tuple[Float[Tensor, "n classes"], Tensor]:
    """Returns one row of logits per target: classes stand on the last axis or, as in torch's losses, on axis 1.

    Raises:
        DataError: Targets do not fit the outputs, or are no classes.
    """
    if outputs.dim() == targets.dim() + 1 and outputs.shape[:-1] == targets.shape:
        logits = outputs.reshape(-1, outputs.shape[-1])
    elif outputs.dim() == targets.dim() + 1 and (outputs.shape[0], *outputs.shape[2:]) == tuple(targets.shape):
        logits = outputs.movedim(1, -1).reshape(-1, outputs.shape[1])
    else:
        raise DataError(
            f"Outputs have shape {tuple(outputs.shape)}, class targets {tuple(targets.shape)}: "
            "expected one row of logits per target. Choose targets of the network's own task, in the data or with "
            "--label-key."
        )
    classes = targets.reshape(-1)
    wrong = classes[((classes < 0) | (classes >= logits.shape[1])) & (classes != IGNORED)]
    if wrong.numel():
        raise DataError(
            f"Target {int(wrong[0])} is no class of a model with {logits.shape[1]} outputs. Check the data's labels."
        )
    return logits, classes
