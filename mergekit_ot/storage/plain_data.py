"""What may be written on from a file that was read: tensors, arrays and plain data, as Python has them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from mergekit_ot.storage.pickled_arrays import HeldArray, HeldNamespace
from mergekit_ot.storage.pickles import HeldBytes, Named
from mergekit_ot.storage.store import compacted

_MOST_DEPTH = 60


class NotPlainError(ValueError):
    """Something that is no plain data."""


@final
class PlainCopy:
    """Copies what was read from a file, each part once, however often it stands there.

    Example:
        >>> PlainCopy().of({"sizes": [4, 2], "rate": 0.1})
        {'sizes': [4, 2], 'rate': 0.1}
    """

    def __init__(self) -> None:
        # With what was copied, which keeps its identity as long as it is held.
        self._done: dict[int, tuple[object, Any]] = {}

    def of(self, value: object, depth: int = 0) -> Any:
        """Returns a value as plain data.

        Raises:
            NotPlainError: There is something in it that is not.
        """
        if value is None or isinstance(value, str | bool | int | float | complex | bytes | bytearray):
            return value
        if id(value) not in self._done:
            if depth > _MOST_DEPTH:
                raise NotPlainError("nested too deeply, or in itself")
            self._done[id(value)] = (value, self._copied(value, depth + 1))
        return self._done[id(value)][1]

    def _copied(self, value: object, depth: int) -> Any:
        if isinstance(value, Tensor):
            return compacted(value)
        if isinstance(value, HeldArray) and value.tensor is not None:
            return value.tensor.numpy()
        if isinstance(value, HeldBytes):
            return value.text.encode("latin-1", "replace")
        if isinstance(value, HeldNamespace):
            made = argparse.Namespace()
            vars(made).update({key: self.of(inner, depth) for key, inner in value.values.items()})
            return made
        if isinstance(value, Mapping):
            return {self._key(key): self.of(inner, depth) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.of(inner, depth) for inner in value]
        if isinstance(value, tuple):
            return tuple(self.of(inner, depth) for inner in value)
        dtype = vars(torch).get(value.name.removeprefix("torch.")) if isinstance(value, Named) else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise NotPlainError(type(value).__name__)

    @staticmethod
    def _key(key: object) -> Any:
        if key is None or isinstance(key, str | bool | int | float | bytes):
            return key
        raise NotPlainError(f"a key of the type {type(key).__name__}")
