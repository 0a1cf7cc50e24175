"""A single array of NumPy (``.npy``), mapped and never unpickled; its labels may lie in another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergekit_ot import DataNeeds, DataReader, DataRequest
from mergekit_ot.errors import DataError, reason_of
from mergeot_data.values import places

_OPTIONS = ("labels", "mean", "std", "batch", "limit")


def array_reader(request: DataRequest) -> DataReader:
    """Returns what reads an array with a row per sample.

    Raises:
        DataError: An option is not known, an array is damaged, or two do not pair up.
    """
    request.check_options(_OPTIONS)
    inputs, name = _opened(request.path), request.text("labels")
    labels = None if name is None else _opened(Path(name))
    if labels is not None and len(labels) != len(inputs):
        raise DataError(
            f"'{request.path}' has {len(inputs)} rows, and its labels '{name}' {len(labels)}: both need one per sample."
        )

    def read(needs: DataNeeds) -> Iterator[tuple[Tensor, Tensor | None]]:
        for rows in places(len(inputs), request):
            yield _numbers(inputs[rows], request), None if labels is None else _targets(labels[rows])

    return read


def _opened(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as failure:
        raise DataError(
            f"'{path}' is no array of numbers, or damaged ({reason_of(failure)}). Save it with numpy.save."
        ) from failure
    if not isinstance(array, np.ndarray) or array.ndim < 1 or array.dtype.kind not in "biuf":
        raise DataError(f"'{path}' holds no rows of numbers. Save an array with numpy.save, a row per sample.")
    return array


def _numbers(rows: Any, request: DataRequest) -> Tensor:
    values = torch.from_numpy(np.array(rows))
    values = values.float() / 255 if values.dtype is torch.uint8 else values
    values = values.float() if values.dtype is torch.float64 else values
    for key, sign in (("mean", -1), ("std", 0)):
        number = request.options.get(key)
        if number is None:
            continue
        if not isinstance(number, int | float) or (key == "std" and not number) or not values.is_floating_point():
            raise DataError(f"{key}={number} of '{request.spec}': it is one number, for inputs that are fractions.")
        values = values + sign * number if sign else values / number
    return values


def _targets(rows: Any) -> Tensor:
    values = torch.from_numpy(np.array(rows))
    return values if values.is_floating_point() else values.long()
