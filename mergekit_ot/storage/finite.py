"""Weights that are NaN or infinite: looked for where a tensor is first read."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import final

import torch
from torch import Tensor

from mergekit_ot.errors import CheckpointError
from mergekit_ot.storage.store import MemoryStore, TensorStore

# What is said of a tensor that is not finite, where its state was read from a file, and where a program gave it.
OF_A_FILE = (
    "Tensor '{name}' of '{owner}' has {bad} of {count} entries that are NaN or infinite: its training diverged, or the "
    "file is damaged. Use an earlier checkpoint of that training."
)
OF_A_MODEL = (
    "'{name}' of {owner} holds NaN or infinity, so no neuron of it can be compared. "
    "Take a checkpoint from before the training diverged."
)

IMPLAUSIBLE = (
    "Tensor '{name}' of '{owner}' has an entry of size {largest}, which no network computes with: one bit of the file "
    "was changed, or it is not what it says. Copy it again, or use an earlier checkpoint."
)
# One wrong bit of the exponent makes a weight that large; no sum of such numbers is sure to be one.
_PLAUSIBLE, _PLAUSIBLE_DOUBLE = 1e33, 1e290


def check_finite(state: Mapping[str, Tensor], owner: str, sentence: str = OF_A_FILE) -> None:
    """Checks that no weight is NaN, infinite or absurdly large; integer tensors have no such value.

    Args:
        state: Name → tensor; a store is read one tensor at a time.
        owner: Whose state it is, for the message.
        sentence: The message, with ``{name}``, ``{owner}``, ``{bad}`` and ``{count}``.

    Raises:
        CheckpointError: Names the first tensor that is not finite, or has an entry that a wrong bit made.
    """
    for name, tensor in state.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        # Narrow float types have no test of their own.
        wide = tensor.float() if tensor.is_floating_point() and tensor.element_size() < 2 else tensor
        largest = _largest(wide)
        if largest <= (_PLAUSIBLE_DOUBLE if wide.dtype in (torch.float64, torch.complex128) else _PLAUSIBLE):
            continue
        bad = int((~torch.isfinite(wide)).sum())
        if bad:
            raise CheckpointError(sentence.format(name=name, owner=owner, bad=bad, count=tensor.numel()))
        raise CheckpointError(IMPLAUSIBLE.format(name=name, owner=owner, largest=f"{largest:.1e}"))


def is_finite(tensor: Tensor) -> bool:
    """Returns whether no entry is NaN or infinite: by the least and the largest one, in one pass without a copy.

    Example:
        >>> is_finite(torch.tensor([1.0, 2.0])), is_finite(torch.tensor([1.0, math.nan])), is_finite(torch.zeros(0))
        (True, False, True)
    """
    return math.isfinite(_largest(tensor))


def _largest(tensor: Tensor) -> float:
    """Returns the size of the largest entry: NaN where one is NaN."""
    if not tensor.numel():
        return 0.0
    parts = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    low, high = torch.aminmax(parts)
    return max(-float(low), float(high), key=lambda size: math.inf if math.isnan(size) else size)


@final
class FiniteStore(TensorStore):
    """A store that refuses weights that are NaN or infinite; each tensor is looked at once, when it is first read.

    Args:
        store: Gives the tensors.
        owner: Whose they are, for the message.
        sentence: The message.
    """

    def __init__(self, store: TensorStore, owner: str, sentence: str = OF_A_FILE) -> None:
        self.store, self.owner, self.sentence = store, owner, sentence
        self._looked_at: set[str] = set()

    @property
    def names(self) -> Collection[str]:
        """Names of the tensors, in order."""
        return self.store.names

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of a tensor."""
        return self.store.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Returns the type of a tensor's entries."""
        return self.store.dtype(name)

    def read(self, name: str) -> Tensor:
        """Returns a tensor.

        Raises:
            CheckpointError: It is not finite.
        """
        tensor = self.store.read(name)
        if name not in self._looked_at:
            check_finite({name: tensor}, self.owner, self.sentence)
            self._looked_at.add(name)
        return tensor

    def slice(self, name: str, start: int, stop: int) -> Tensor:
        """Returns a part of a tensor.

        Raises:
            CheckpointError: The part is not finite.
        """
        tensor = self.store.slice(name, start, stop)
        if name not in self._looked_at:
            check_finite({name: tensor}, self.owner, self.sentence)
        return tensor

    def check_all(self) -> None:
        """Reads every tensor that was not read yet, one at a time.

        Raises:
            CheckpointError: One is not finite.
        """
        for name in self.names:
            if name not in self._looked_at:
                self.read(name)

    def check_in_memory(self) -> None:
        """Looks at all tensors if they stand in memory already, where nothing is read for it.

        Raises:
            CheckpointError: One is not finite.
        """
        if isinstance(self.store, MemoryStore):
            self.check_all()

    def digest(self) -> str:
        """Returns the SHA-256 of the file, or of all tensors."""
        return self.store.digest()

    def close(self) -> None:
        """Closes the store that gives the tensors."""
        self.store.close()
