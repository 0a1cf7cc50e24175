"""The samples that networks are compared on, in batches of one size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_ot import (
    DataError,
    Disagreement,
    axis_of_classes,
    probabilities_of,
    tensors_of,
)

# Networks are also proven to stay the same on a batch, which takes time in proportion to it.
_BATCH = 20
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Samples:
    """Inputs in batches of one size, and their targets where they have any.

    Attributes:
        inputs: One tuple of tensors per batch.
        targets: One tensor per batch, or nothing.
    """

    inputs: tuple[Inputs, ...]
    targets: tuple[Tensor, ...] = ()

    @property
    def count(self) -> int:
        """How many samples there are."""
        return sum(len(batch[0]) for batch in self.inputs)

    def labelled(self, targets: Iterable[Tensor]) -> list[tuple[Inputs, Tensor]]:
        """Returns the batches with targets, as they are scored."""
        return list(zip(self.inputs, targets, strict=True))


def read_samples(data: Iterable[Any], most: int) -> Samples:
    """Takes samples from the start of data, in batches of one size.

    Args:
        data: Batches of inputs, or of (inputs, targets). Samples of another shape than the first are left out.
        most: Samples at most.

    Raises:
        DataError: There are fewer than two samples.

    Example:
        >>> samples = read_samples([(torch.zeros(3, 4), torch.zeros(3).long())], 2)
        >>> samples.count, tuple(samples.targets[0].shape)
        (2, (2,))
    """
    columns: list[Inputs] = []
    targets: list[Tensor] = []
    count = 0
    for inputs, target in map(_taken_apart, data):
        if columns and [each.shape[1:] for each in inputs] != [each.shape[1:] for each in columns[0]]:
            continue
        columns.append(inputs)
        targets += [] if target is None else [target]
        count += len(inputs[0])
        if count >= most:
            break
    count = min(count, most)
    if count < 2:
        raise DataError("The data hold fewer than two samples: networks are compared on some hundred. Give more.")
    size = min(_BATCH, count)
    count -= count % size
    whole = [torch.cat(parts)[:count] for parts in zip(*columns, strict=True)]
    batches = tuple(zip(*(each.split(size) for each in whole), strict=True))
    is_labelled = len(targets) == len(columns)
    return Samples(batches, tuple(torch.cat(targets)[:count].split(size)) if is_labelled else ())


def _taken_apart(item: Any) -> tuple[Inputs, Tensor | None]:
    inputs, target = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
    if isinstance(inputs, list | tuple) and len(inputs) == 1 and isinstance(item, tuple | list) and len(item) == 1:
        inputs = inputs[0]
    given = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    if not all(isinstance(each, Tensor) for each in given):
        raise DataError("A batch of the data is neither a tensor of inputs nor a pair of inputs and targets.")
    return given, target if isinstance(target, Tensor) else None


@dataclass(frozen=True)
class Answers:
    """What networks say about the samples.

    Attributes:
        disagreement: How their predictions differ, where they predict classes.
        together: What all of them say in the mean: classes, or numbers where there are none. One tensor per batch.
    """

    disagreement: Disagreement | None
    together: tuple[Tensor, ...]


def answers_of(models: list[nn.Module], samples: Samples) -> Answers:
    """Runs networks on the samples.

    Raises:
        DataError: A network gives nothing, or not as many predictions as there are inputs.
    """
    found, together = Disagreement(len(models)), []
    for inputs in samples.inputs:
        with torch.no_grad():
            outputs = [tensors_of(model(*inputs))[0] for model in models]
        if any(each.shape != outputs[0].shape for each in outputs):
            return Answers(None, ())
        axis = axis_of_classes(outputs[0].shape, inputs)
        if outputs[0].ndim < 2 or outputs[0].shape[axis] < 2:
            together.append(torch.stack(outputs).mean(0))
            continue
        found.add([probabilities_of(each, axis) for each in outputs])
        mean = torch.stack([each.softmax(axis) for each in outputs]).mean(0)
        together.append(mean.argmax(axis))
    return Answers(found if found.count else None, tuple(together))
