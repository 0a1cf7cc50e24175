"""Calibration data: batches of inputs, of one size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from mergekit_ot.errors import ArchitectureError, DataError
from mergekit_ot.graph.capture.capture import as_inputs

# Samples per calibration batch: enough to fill the cores, small enough that all layers' responses fit.
CALIBRATION_BATCH = 100


def calibration_batches(data: Iterable[Any], size: int, batch: int) -> Iterator[tuple[Tensor, ...]]:
    """Yields the inputs of at most `size` samples in batches of exactly `batch` (a captured program fixes it).

    Args:
        data: Batches of inputs, or of (inputs, targets).
        size: Samples at most; what is left over from the last full batch is dropped.
        batch: Samples per batch.

    Raises:
        DataError: There are fewer than `batch` samples, or a batch holds no tensor.
    """
    waiting: list[tuple[Tensor, ...]] = []
    held = given = 0
    for item in data:
        inputs = inputs_of(item)
        waiting.append(inputs)
        held += inputs[0].shape[0]
        while held >= batch and given + batch <= size:
            columns = [torch.cat([w[i] for w in waiting]) for i in range(len(inputs))]
            yield tuple(column[:batch] for column in columns)
            waiting = [tuple(column[batch:] for column in columns)]
            held -= batch
            given += batch
        if given + batch > size:
            return
    if given == 0:
        raise DataError(
            f"The calibration data hold {held} samples; at least {batch} are needed. Give more with --data."
        )


def inputs_of(item: Any) -> tuple[Tensor, ...]:
    """Returns the inputs of a batch, which may be a tensor, (inputs, targets), or a tuple of inputs with targets."""
    inputs = item[0] if isinstance(item, tuple | list) and item else item
    tensors = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    if not tensors or not all(isinstance(x, Tensor) for x in tensors):
        raise DataError(
            f"A calibration batch is {type(item).__name__}, not a tensor or a pair (inputs, targets). "
            "Yield pairs of tensors from the data SPEC."
        )
    return tensors


def calibration(
    data: Iterable[Any] | None,
    size: int,
    needs_batches: bool,
    example_inputs: Tensor | tuple[object, ...] | None,
) -> tuple[tuple[tuple[Tensor, ...], ...], tuple[object, ...]]:
    """Returns the calibration batches and the inputs to trace with, of the same shapes."""
    if data is not None and (needs_batches or example_inputs is None):
        if not needs_batches:
            return (), inputs_of(next(iter(data)))
        batches = calibration_inputs(data, size)
        return batches, batches[0]
    if example_inputs is None:
        raise ArchitectureError(
            "A model is traced at example inputs, and none are known. "
            "Pass example_inputs=… (--input-shape on the command line), or data."
        )
    return (), as_inputs(example_inputs)


def calibration_inputs(data: Iterable[Any], size: int) -> tuple[tuple[Tensor, ...], ...]:
    """Returns calibration inputs in batches of one size, at most `size` samples; trace the sources with the first.

    Raises:
        DataError: There are fewer than two samples, or a batch holds no tensor.
    """
    held = list(_limited(data, size))
    count = min(size, sum(inputs_of(item)[0].shape[0] for item in held))
    batch = min(CALIBRATION_BATCH, count)
    if batch < 2:
        raise DataError(f"The calibration data hold {count} samples; at least 2 are needed.")
    return tuple(calibration_batches(held, size, batch))


def _limited(data: Iterable[Any], size: int) -> Iterable[Any]:
    held = 0
    for item in data:
        yield item
        held += inputs_of(item)[0].shape[0]
        if held >= size:
            return
