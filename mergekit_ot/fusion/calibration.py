"""Calibration data: batches of inputs of one size to fit to, and others that nothing is fitted to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mergekit_ot.errors import ArchitectureError, DataError
from mergekit_ot.fusion.alike import brought_to
from mergekit_ot.fusion.samples import check_outliers, distinct, inputs_of, read_samples, tokens_note
from mergekit_ot.graph.capture.inputs import as_inputs
from mergekit_ot.scoring.inputs import check_inputs

Batches = tuple[tuple[Tensor, ...], ...]

# Samples per calibration batch: enough to fill the cores, small enough that all layers' responses fit.
CALIBRATION_BATCH = 100
# Samples that a repair is judged on: one of so many, so many at most; where there are few of them at least so many,
# half of all where that is less.
_HELD_OUT_SHARE, MOST_HELD_OUT, LEAST_HELD_OUT = 5, 200, 20
# With fewer there is nothing to fit to and to judge on.
LEAST_SAMPLES = 4
# Batches of the samples to fit to, where there are few: a cross-validation needs some.
_BATCHES = 8


@dataclass(frozen=True)
class CalibrationData:
    """Calibration inputs.

    Attributes:
        batches: To be fitted to, in batches of one size (a captured program fixes it).
        held_out: That nothing is fitted to, for the result to be judged on; none where it is not.
        notes: What the user should know about them.
    """

    batches: Batches = ()
    held_out: Batches = ()
    notes: tuple[str, ...] = ()


def calibration_batches(
    data: Iterable[Any], size: int, batch: int, like: Sequence[object] = ()
) -> Iterator[tuple[Tensor, ...]]:
    """Yields the inputs of at most `size` samples in batches of exactly `batch` (a captured program fixes it).

    Args:
        data: Batches of inputs, or of (inputs, targets).
        size: Samples at most; what is left over from the last full batch is dropped.
        batch: Samples per batch.
        like: Inputs whose samples have the only shapes that are taken; those of the first batch by default.

    Raises:
        DataError: There are fewer than `batch` samples, or a batch holds no tensor.
    """
    waiting: list[tuple[Tensor, ...]] = []
    wanted = [part.shape[1:] for part in like if isinstance(part, Tensor)]
    held = given = 0
    for item in data:
        inputs = inputs_of(item)
        wanted = wanted or [part.shape[1:] for part in inputs]
        fitting = brought_to(inputs, wanted)
        if fitting is None:
            continue
        inputs = fitting
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


def calibration(
    data: Iterable[Any] | None,
    size: int,
    needs_batches: bool,
    example_inputs: Tensor | tuple[object, ...] | None,
    *,
    is_judged: bool = False,
) -> tuple[CalibrationData, tuple[object, ...]]:
    """Returns the calibration data and the inputs to trace with, of the same shapes.

    Args:
        data: Batches of inputs, or of (inputs, targets).
        size: Samples to fit to at most.
        needs_batches: Whether anything is fitted to them.
        example_inputs: To trace with, where nothing is.
        is_judged: Whether a part is held out for a repair to be judged on.
    """
    if data is not None and (needs_batches or example_inputs is None):
        if not needs_batches:
            return CalibrationData(), _first_inputs(data)
        held = split_calibration(data, size) if is_judged else _without_judge(data, size)
        return replace(held, notes=(*held.notes, *tokens_note(held.batches))), held.batches[0]
    if example_inputs is None:
        raise ArchitectureError(
            "A model is traced at example inputs, and none are known. "
            "Pass example_inputs=… (--input-shape on the command line), or data."
        )
    return CalibrationData(), as_inputs(example_inputs)


def calibration_inputs(data: Iterable[Any], size: int) -> Batches:
    """Returns calibration inputs in batches of one size, at most `size` samples; trace the sources with the first.

    Raises:
        DataError: There are fewer than two samples, all are the same, one is not finite or an outlier, or a batch
            holds no tensor.
    """
    return _without_judge(data, size).batches


def _without_judge(data: Iterable[Any], size: int) -> CalibrationData:
    samples, notes = read_samples(data, size)
    count = len(samples[0]) if samples else 0
    batch = min(CALIBRATION_BATCH, count)
    if batch < 2:
        raise DataError(f"The calibration data hold {count} samples; at least 2 are needed.")
    check_outliers(samples)
    if len(distinct(samples)) < 2:
        raise DataError(f"{_all_same(count)} Give the inputs that the sources were trained on, or some like them.")
    return CalibrationData(in_batches(samples, batch), notes=notes)


def split_calibration(data: Iterable[Any], size: int) -> CalibrationData:
    """Returns calibration inputs to fit to, at most `size`, and others to judge what was fitted.

    A fifth as many are held out, 200 at most, and 20 at least where there are 40: of what the data hold beyond `size`,
    or else of the samples themselves, drawn at random by a fixed seed. A copy of an earlier sample is neither.

    Raises:
        DataError: There are too few different samples, one is not finite or an outlier, or a batch holds no tensor.
    """
    read, notes = read_samples(data, size + _held_out(size))
    count = len(read[0]) if read else 0
    places = distinct(read) if count else []
    if len(places) < LEAST_SAMPLES or size < LEAST_SAMPLES:
        what = _all_same(count) if len(places) == 1 < count else f"The calibration data hold {count} samples"
        more = f", {len(places)} of them different" if 1 < len(places) < count else ""
        raise DataError(
            f"{what.rstrip('.')}{more}; a repair needs at least {LEAST_SAMPLES} different ones, to be fitted to some "
            "and judged on others, and some hundred to gain anything. Give more with --data (--calibration-size)."
        )
    samples = read
    if len(places) < count:
        samples = tuple(part[places] for part in read)
        notes = (
            *notes,
            f"Of {count:,} calibration samples {count - len(places):,} repeat others: each counts once.",
        )
    check_outliers(samples)
    return _split(samples, size, notes)


def _split(samples: Sequence[Tensor], size: int, notes: tuple[str, ...]) -> CalibrationData:
    """Returns different samples, some of which are held out."""
    count = len(samples[0])
    held = _held_out(min(size, count))
    if count >= size + held:
        to_fit = tuple(part[:size] for part in samples)
        to_judge = tuple(part[size : size + held] for part in samples)
    else:
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        fitted, judged = drawn[held:].sort().values, drawn[:held].sort().values
        to_fit, to_judge = tuple(part[fitted] for part in samples), tuple(part[judged] for part in samples)
    batch = max(2, min(CALIBRATION_BATCH, len(to_fit[0]) // _BATCHES))
    return CalibrationData(in_batches(to_fit, batch), in_batches(to_judge, batch), notes)


def _first_inputs(data: Iterable[Any]) -> tuple[Tensor, ...]:
    for item in data:
        inputs = inputs_of(item)
        check_inputs(inputs, "data", batch=0, first=0, what="sample")
        return inputs
    raise DataError("The data hold no batch. Give some with --data, or --input-shape.")


def _held_out(count: int) -> int:
    """Returns how many of so many samples are held out."""
    return min(MOST_HELD_OUT, max(count // _HELD_OUT_SHARE, min(LEAST_HELD_OUT, count // 2)))


def in_batches(samples: Sequence[Tensor], batch: int) -> Batches:
    """Returns samples in batches of exactly one size; what is left over is dropped."""
    whole = len(samples[0]) // batch * batch
    return tuple(zip(*(part[:whole].split(batch) for part in samples), strict=True))


def _all_same(count: int) -> str:
    return f"The calibration data hold one sample, {count} times: nothing differs, so nothing can be told from it."
