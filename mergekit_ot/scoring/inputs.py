"""Inputs that are NaN or infinite: one of them spoils a mean over all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mergekit_ot.errors import DataError


def check_inputs(inputs: Any, data: str, *, batch: int, first: int, what: str = "input") -> None:
    """Checks that every number of a batch is finite; integers, and what is no tensor, have no such value.

    Args:
        inputs: A tensor with one sample per row, or several.
        data: What the samples belong to, for the message.
        batch: Number of the batch, counted from 0.
        first: How many samples the batches before it hold.
        what: What one sample is, for the message.

    Raises:
        DataError: Names the first sample that is not finite.
    """
    for part in inputs if isinstance(inputs, tuple | list) else (inputs,):
        if not isinstance(part, Tensor) or not (part.is_floating_point() or part.is_complex()) or not part.numel():
            continue
        # Narrow float types have no test of their own.
        wide = part.float() if part.element_size() < 2 else part
        bad = ~torch.isfinite(wide)
        if not bool(bad.any()):
            continue
        rows = bad.reshape(part.shape[0] if part.ndim else 1, -1)
        place = int(rows.any(1).nonzero()[0])
        raise DataError(
            f"{what.capitalize()} {first + place} of the {data} (batch {batch}, place {place}, all counted from 0) has "
            f"{int(rows[place].sum())} of {rows.shape[1]} numbers that are NaN or infinite: one of them spoils what is "
            f"made of all. Mend it, or leave it out (such {what}s in this batch: {int(rows.any(1).sum())})."
        )
