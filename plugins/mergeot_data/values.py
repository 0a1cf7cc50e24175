"""What the readers of all kinds of data have in common: batches of places, labels by name, missing libraries."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_ot import DataRequest
from mergekit_ot.errors import DataError

BATCH = 100


def places(count: int, request: DataRequest, batch: int = BATCH) -> Iterator[Sequence[int]]:
    """Yields the places of the samples of each batch; for calibration in an order drawn by a fixed seed.

    Args:
        count: Samples in all.
        request: Says ``batch=`` and ``limit=``.
        batch: Samples per batch where it does not.
    """
    order = list(range(count))
    if request.split == "train":
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    order = order[: request.whole("limit", max(count, 1))]
    size = request.whole("batch", batch)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def needed(module: str, what: str) -> Any:
    """Returns a library of the extra ``data``.

    Raises:
        DataError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        name = {"PIL": "Pillow"}.get(module.partition(".")[0], module.partition(".")[0])
        raise DataError(f"{what} needs {name}, which is not installed: pip install 'mergekit-ot[data]'.") from missing


def label_numbers(values: Sequence[str]) -> dict[str, int] | None:
    """Returns what number each label is: names in the order of the alphabet; None where they are numbers already.

    Example:
        >>> label_numbers(["dog", "cat", "dog"]), label_numbers(["1", "0"])
        ({'cat': 0, 'dog': 1}, None)
    """
    if all(value.strip().lstrip("-").isdecimal() for value in values):
        return None
    return {name: number for number, name in enumerate(sorted(set(values)))}


def as_labels(values: Sequence[str], numbers: dict[str, int] | None) -> Tensor:
    """Returns labels as whole numbers."""
    return torch.tensor([int(value) if numbers is None else numbers[value] for value in values])
