"""A text file: sequences of tokens, each token's target the next."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mergekit_ot import DataNeeds, DataReader, DataRequest
from mergekit_ot.errors import DataError
from mergeot_data.values import places
from mergeot_data.words import WORD_OPTIONS, encoder, length_of, text_of


def text_reader(request: DataRequest) -> DataReader:
    """Returns what reads a text in sequences of one length, one after the other; what is left at the end is dropped.

    Raises:
        DataError: An option is not known.
    """
    request.check_options((*WORD_OPTIONS, "batch", "limit"))

    def read(needs: DataNeeds) -> Iterator[tuple[Tensor, Tensor]]:
        text = text_of(request.path)
        tokens = torch.tensor(encoder(request, needs, text)(text), dtype=torch.int64)
        length = length_of(request, needs)
        count = (len(tokens) - 1) // length
        if count < 1:
            raise DataError(
                f"'{request.path}' has {len(tokens)} tokens, and a sequence takes {length} and the one after it. Give "
                "more text, or ?length=…."
            )
        inputs, targets = (tokens[start : start + count * length].reshape(count, length) for start in (0, 1))
        for rows in places(count, request, batch=20):
            yield inputs[rows], targets[rows]

    return read
