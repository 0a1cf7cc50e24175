"""Samples of calibration data: what is read of them, and whether anything can be fitted to them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot.errors import DataError
from mergekit_ot.fusion.alike import alike
from mergekit_ot.fusion.options import MOST_SAMPLES, FusionOptions
from mergekit_ot.scoring.inputs import check_inputs

_WHAT = "calibration data"
# A sample is an outlier that is so many times as far from the middle, or has a number so many times as far from it, as
# nine of ten others: what is fitted by least squares is decided by it alone.
_FAR, _FAR_NUMBER = 10.0, 100.0
_USUAL = 0.9
# Samples of which the middle is the median; a few tell where the data are.
_FOR_THE_MIDDLE = 15
_TOGETHER = 100


def with_limit(data: Iterable[Any], options: FusionOptions) -> tuple[Iterable[Any], int]:
    """Returns calibration data, and how many of their samples are taken at most.

    Args:
        data: Batches of inputs, or of (inputs, targets); the first is read where tokens are counted.
        options: How many samples or tokens are asked for.

    Raises:
        DataError: Tokens are counted, and the first sample holds none, or more than may be taken.
    """
    tokens, size = options.calibration_tokens, options.calibration_size
    if tokens is None:
        return data, size
    batches = iter(data)
    first = next(batches, None)
    again = itertools.chain([first], batches) if batches is data and first is not None else data
    each = 0 if first is None else tokens_per_sample(inputs_of(first))
    if not each:
        raise DataError(
            f"calibration_tokens is {tokens:,}, and the calibration data hold no tokens: no input is a sequence of "
            "whole numbers. Say how many inputs to take, with calibration_size (--calibration-size)."
        )
    if tokens < each:
        raise DataError(
            f"calibration_tokens is {tokens:,}, and one sequence of the calibration data holds {each:,} tokens. Whole "
            f"sequences are taken, and two are needed at least: give {2 * each:,} or more, better some thousand."
        )
    sequences = tokens // each
    return again, sequences if size == MOST_SAMPLES else min(size, sequences)


def tokens_per_sample(inputs: Sequence[Tensor]) -> int:
    """Returns how many tokens a sample holds: the length of the first input that is sequences of whole numbers, or 0.

    Example:
        >>> tokens_per_sample([torch.zeros(4, 3, 8, 8), torch.zeros(4, 12).long()])
        12
    """
    sequences = (part for part in inputs if part.ndim == 2 and not part.is_floating_point() and not part.is_complex())
    return next((part.shape[1] for part in sequences if part.dtype is not torch.bool), 0)


def tokens_note(batches: Sequence[Sequence[Tensor]]) -> tuple[str, ...]:
    """Returns a sentence on how much calibration data there are, where they are tokens."""
    each = tokens_per_sample(batches[0]) if batches else 0
    count = sum(len(inputs[0]) for inputs in batches)
    if not each:
        return ()
    return (
        f"Calibrated on {count:,} sequences of {each:,} tokens, {count * each:,} tokens in all (--calibration-size "
        "counts sequences, --calibration-tokens tokens).",
    )


def read_samples(data: Iterable[Any], most: int) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """Returns the inputs of at most `most` samples, one tensor per input, a row per sample; and what was done to them.

    Samples of different lengths are brought to one, if that hides no mistake: see `alike`.

    Args:
        data: Batches of inputs, or of (inputs, targets); targets are never read.
        most: Samples at most; no batch beyond them is asked for.

    Raises:
        DataError: A batch holds no tensor, holds NaN or infinity, or shapes that cannot stand beside those before it.
    """
    held: list[tuple[Tensor, ...]] = []
    is_mixed = False
    count = 0
    for number, item in enumerate(data):
        inputs = inputs_of(item)
        _check_lengths(inputs, number)
        check_inputs(inputs, _WHAT, batch=number, first=count, what="sample")
        if held and not is_mixed and [part.shape[1:] for part in inputs] != [part.shape[1:] for part in held[0]]:
            if alike([held[0], inputs]) is None:
                raise DataError(
                    f"Batch {number} of the calibration data (counted from 0) has samples of shape {_shapes(inputs)}, "
                    f"the batches before it of {_shapes(held[0])}: they cannot stand in one batch. Give samples of one "
                    "shape; sequences and images alone may differ in length and size."
                )
            is_mixed = True
        held.append(inputs)
        count += inputs[0].shape[0]
        if count >= most:
            break
    notes: tuple[str, ...] = ()
    if is_mixed:
        found = alike(held)
        if found is None:
            raise DataError(
                "The samples of the calibration data have shapes that cannot stand in one batch. Give samples of one "
                "shape; sequences and images alone may differ in length and size."
            )
        held, how = found
        notes = (f"Calibration data: {how}.",)
    return tuple(torch.cat(parts)[:most] for parts in zip(*held, strict=True)), notes


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


def check_outliers(samples: Sequence[Tensor]) -> None:
    """Checks that no sample is so large that it alone decides what is fitted to all.

    Raises:
        DataError: Names the farthest sample.
    """
    for part in samples:
        if not part.is_floating_point() or part.ndim < 1 or len(part) < 3:
            continue
        lengths, numbers = _sizes(part)
        usual = _usual(lengths), _usual(numbers)
        far = torch.maximum(lengths / (_FAR * usual[0]), numbers / (_FAR_NUMBER * usual[1]))
        # Where nine of ten samples are the same, what differs is no outlier but all that there is.
        if not float(usual[0]) > 0 or not bool((far > 1).any()):
            continue
        place = int(far.argmax())
        raise DataError(
            f"Sample {place} of the calibration data (counted from 0) is an outlier: it has a number as large as "
            f"{float(part[place].abs().max()):.3g}, and is {float(lengths[place] / usual[0]):.3g} times as far "
            f"from the middle of the data as nine of ten others; it alone would decide what is fitted to all "
            f"{len(part)}. Look for a damaged input, and leave it out; outliers in all: {int((far > 1).sum())}."
        )


def distinct(samples: Sequence[Tensor]) -> list[int]:
    """Returns the places of the samples that are no copy of an earlier one."""
    seen: dict[bytes, int] = {}
    rows = [part.reshape(len(part), -1).contiguous().view(torch.uint8) for part in samples if part.numel()]
    for place in range(len(samples[0])):
        digest = hashlib.blake2b(digest_size=16)
        for part in rows:
            digest.update(part[place].numpy().tobytes())
        seen.setdefault(digest.digest(), place)
    return list(seen.values())


def _sizes(samples: Tensor) -> tuple[Float[Tensor, " sample"], Float[Tensor, " sample"]]:
    """Returns how far each sample is from the middle of all, and its number that is farthest."""
    few = torch.linspace(0, len(samples) - 1, min(_FOR_THE_MIDDLE, len(samples))).long()
    middle = samples[few].double().median(0).values
    lengths, numbers = [], []
    for part in samples.split(_TOGETHER):
        rows = (part.double() - middle).flatten(1) if part.ndim > 1 else (part.double() - middle)[:, None]
        numbers.append(rows.abs().amax(1))
        # Scaled first, since the square of a large number overflows.
        lengths.append(numbers[-1] * (rows / numbers[-1].clamp_min(1e-300)[:, None]).norm(dim=1))
    return torch.cat(lengths), torch.cat(numbers)


def _usual(sizes: Float[Tensor, " sample"]) -> Float[Tensor, ""]:
    """Returns what nine of ten samples stay below; the largest is never among them."""
    ordered = sizes.sort().values
    return ordered[min(int(_USUAL * len(sizes)), len(sizes) - 2)]


def _check_lengths(inputs: Sequence[Tensor], number: int) -> None:
    if any(part.ndim == 0 for part in inputs) or len({len(part) for part in inputs}) > 1:
        shapes = ", ".join(str(tuple(part.shape)) for part in inputs)
        raise DataError(
            f"Batch {number} of the calibration data (counted from 0) has inputs of shape {shapes}: every input needs "
            "one row per sample, as many as the others. Change the data SPEC."
        )


def _shapes(inputs: Sequence[Tensor]) -> str:
    return ", ".join(str(tuple(part.shape[1:])) for part in inputs)
