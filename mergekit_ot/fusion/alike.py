"""Samples of different sizes in one batch: padded beside a mask, cut where they are tokens, grouped otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

Inputs = tuple[Tensor, ...]


def alike(batches: Sequence[Inputs]) -> tuple[list[Inputs], str] | None:
    """Returns batches whose samples have one shape, and a sentence on how; None where that would hide a mistake.

    Sequences of tokens beside a mask are padded; without one, they are cut to the length that keeps most tokens.
    Images, waves and sequences of vectors are grouped: the samples of the commonest shape are kept. Vectors of
    different widths are a mistake.

    Args:
        batches: Of one network, each with samples of one shape; one tensor per input.

    Example:
        >>> kept, how = alike([(torch.zeros(2, 5).long(),), (torch.zeros(2, 3).long(),)])
        >>> [tuple(tokens.shape) for tokens, in kept], how
        ([(2, 3), (2, 3)], 'sequences of 3 to 5 tokens without a mask are cut to the first 3: 4 of 4')
    """
    if len({len(inputs) for inputs in batches}) > 1 or len({part.ndim for inputs in batches for part in inputs}) > 1:
        return _grouped(batches) if len({len(inputs) for inputs in batches}) == 1 else None
    if all(part.ndim == 2 and _is_whole(part) for inputs in batches for part in inputs):
        return _padded(batches) if _has_mask(batches) else _cut(batches)
    return _grouped(batches)


def brought_to(inputs: Inputs, shapes: Sequence[Sequence[int]]) -> Inputs | None:
    """Returns a batch whose samples have given shapes: sequences of tokens are cut, or padded where there is a mask.

    Args:
        inputs: One tensor per input.
        shapes: Of one sample, one per input.

    Example:
        >>> (tokens,) = brought_to((torch.zeros(2, 5).long(),), [(3,)])
        >>> tokens.shape, brought_to((torch.zeros(2, 3),), [(5,)])
        (torch.Size([2, 3]), None)
    """
    if [tuple(part.shape[1:]) for part in inputs] == [tuple(shape) for shape in shapes]:
        return inputs
    are_tokens = all(part.ndim == 2 and _is_whole(part) for part in inputs)
    if not are_tokens or any(len(shape) != 1 for shape in shapes):
        return None
    more = [shape[0] - part.shape[1] for part, shape in zip(inputs, shapes, strict=True)]
    if max(more) > 0 and not _has_mask([inputs]):
        return None
    return tuple(torch.nn.functional.pad(part, (0, count)) for part, count in zip(inputs, more, strict=True))


def _is_whole(part: Tensor) -> bool:
    return not part.is_floating_point() and not part.is_complex()


def _has_mask(batches: Sequence[Inputs]) -> bool:
    """Whether an input besides the first says of each token whether it counts."""
    first = batches[0][0]
    masks = [part for inputs in batches for part in inputs[1:2]]
    return bool(masks) and masks[0].shape == first.shape and all(bool((mask <= 1).all()) for mask in masks)


def _padded(batches: Sequence[Inputs]) -> tuple[list[Inputs], str]:
    lengths = [inputs[0].shape[1] for inputs in batches]
    longest = max(lengths)
    padded = [
        tuple(torch.nn.functional.pad(part, (0, longest - part.shape[1])) for part in inputs) for inputs in batches
    ]
    return padded, f"sequences of {min(lengths)} to {longest} tokens are padded to {longest}, and masked there"


def _cut(batches: Sequence[Inputs]) -> tuple[list[Inputs], str] | None:
    if any(len({part.shape[1] for part in inputs}) > 1 for inputs in batches):
        return None
    counts: Counter[int] = Counter()
    for inputs in batches:
        counts[inputs[0].shape[1]] += len(inputs[0])
    reaching = {length: sum(count for other, count in counts.items() if other >= length) for length in counts}
    length = max(reaching, key=lambda each: (each * reaching[each], each))
    kept = [tuple(part[:, :length] for part in inputs) for inputs in batches if inputs[0].shape[1] >= length]
    return kept, (
        f"sequences of {min(counts)} to {max(counts)} tokens without a mask are cut to the first {length}: "
        f"{reaching[length]} of {sum(counts.values())}"
    )


def _grouped(batches: Sequence[Inputs]) -> tuple[list[Inputs], str] | None:
    shapes = [tuple(tuple(part.shape[1:]) for part in inputs) for inputs in batches]
    # Only lengths and sides may differ: another width, or number of channels, is another kind of data.
    for other in shapes[1:]:
        for mine, its in zip(shapes[0], other, strict=True):
            if mine != its and (len(mine) != len(its) or len(mine) < 2 or not _is_same_kind(mine, its)):
                return None
    counts: Counter[tuple[tuple[int, ...], ...]] = Counter()
    for shape, inputs in zip(shapes, batches, strict=True):
        counts[shape] += len(inputs[0])
    commonest, count = counts.most_common(1)[0]
    kept = [inputs for shape, inputs in zip(shapes, batches, strict=True) if shape == commonest]
    shown = " and ".join("×".join(map(str, each)) or "one number" for each in commonest)
    return (
        kept,
        f"samples have {len(counts)} shapes, and those of the commonest are kept: {shown}, {count} of "
        f"{sum(counts.values())}",
    )


def _is_same_kind(mine: Sequence[int], its: Sequence[int]) -> bool:
    """Whether shapes differ in lengths or sides alone: sequences have them first, images last."""
    if len(mine) > 2:
        return mine[0] == its[0]
    return sum(size != other for size, other in zip(mine, its, strict=True)) == 1
