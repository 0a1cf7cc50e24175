"""Token sequences of different lengths in batches: padded for networks that take a mask, of one length for others."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

# So many sequences are looked at together, to find those of one length.
_LOOKED_AT = 1000


def sequence_batches(
    rows: Iterable[tuple[list[int], int | None]], batch: int, network: nn.Module | None
) -> Iterator[dict[str, Tensor]]:
    """Yields batches of sequences under the names that libraries of language models use.

    Args:
        rows: Tokens and label of each sequence, or no label.
        batch: Sequences in a batch at most.
        network: What takes them.
    """
    takes_mask = network is not None and "attention_mask" in inspect.signature(network.forward).parameters
    remaining = iter(rows)
    while group := [row for row in itertools.islice(remaining, _LOOKED_AT) if row[0]]:
        if not takes_mask:
            group.sort(key=lambda row: len(row[0]))
        for _, alike in itertools.groupby(group, key=lambda row: 0 if takes_mask else len(row[0])):
            members = list(alike)
            for start in range(0, len(members), batch):
                yield _padded(members[start : start + batch], with_mask=takes_mask)


def _padded(rows: list[tuple[list[int], int | None]], *, with_mask: bool) -> dict[str, Tensor]:
    longest = max(len(tokens) for tokens, _ in rows)
    found = {"input_ids": torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in rows])}
    if with_mask:
        masks = [[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens, _ in rows]
        found["attention_mask"] = torch.tensor(masks)
    labels = [label for _, label in rows if label is not None]
    return found if len(labels) < len(rows) else {**found, "labels": torch.tensor(labels)}
