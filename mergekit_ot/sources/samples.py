"""Data sets of single samples, as torch has them: put together into batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, default_collate

from mergekit_ot.errors import DataError, reason_of

_TOGETHER = 100


def batched(dataset: Dataset[Any], split: str) -> Iterator[Any]:
    """Yields the samples of a data set in batches; those of different shapes, one by one.

    Args:
        dataset: Gives samples.
        split: In ``train`` the order is drawn, the same each time.

    Raises:
        DataError: A sample is nothing that a batch can be made of.

    Example:
        >>> samples = torch.utils.data.TensorDataset(torch.zeros(150, 3), torch.zeros(150))
        >>> [len(inputs) for inputs, _ in batched(samples, "test")]
        [100, 50]
    """
    samples = _samples(dataset, split)
    while group := list(itertools.islice(samples, _TOGETHER)):
        yield from _collated(group)


def _samples(dataset: Any, split: str) -> Iterator[Any]:
    if isinstance(dataset, IterableDataset):
        yield from dataset
        return
    count = len(dataset)
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    for place in drawn if split == "train" else range(count):
        yield dataset[place]


def _collated(samples: list[Any]) -> Iterator[Any]:
    try:
        yield default_collate(samples)
        return
    except (RuntimeError, TypeError, KeyError) as failure:
        first = failure
    try:
        yield from [default_collate([sample]) for sample in samples]
    except (RuntimeError, TypeError) as failure:
        kind = type(samples[0]).__name__
        raise DataError(
            f"No batch can be made of the data set's samples (the first is a {kind}): {reason_of(first)}. Let it give "
            "tensors, numbers, or tuples and dictionaries of these; images need a transform such as ToTensor()."
        ) from failure
