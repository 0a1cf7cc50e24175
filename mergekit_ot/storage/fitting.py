"""A state and the architecture that it is to be loaded into: whether they fit, without reading a tensor."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from mergekit_ot.storage.store import TensorStore

# A counter that older files lack; it takes no part in the function at evaluation.
_OPTIONAL_SUFFIX = "num_batches_tracked"


@dataclass(frozen=True)
class OtherShape:
    """A tensor whose shape in the state is not that of the architecture."""

    name: str
    held: torch.Size
    expected: torch.Size


@dataclass(frozen=True)
class OtherType:
    """A tensor of whole numbers or booleans where the architecture has a weight."""

    name: str
    held: torch.dtype


@dataclass(frozen=True)
class Misfit:
    """How a state and an architecture differ.

    Attributes:
        missing: Names that only the architecture has.
        unexpected: Names that only the state has.
        reshaped: The first tensor of another shape; looked for where the names agree.
        retyped: The first tensor that holds no weights where the architecture has some; looked for where shapes agree.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: OtherShape | None
    retyped: OtherType | None = None


def misfit(store: TensorStore, expected: Mapping[str, Tensor]) -> Misfit | None:
    """Returns how a state differs from the state dict of an architecture, or None where it fits.

    Args:
        store: The state.
        expected: State dict of a fresh instance; its tensors may be on the meta device.

    Example:
        >>> from mergekit_ot.storage.store import MemoryStore
        >>> misfit(MemoryStore({"bias": torch.zeros(2)}), {"weight": torch.zeros(2, 3)}).missing
        ('weight',)
    """
    missing = tuple(name for name in expected if name not in store and not name.endswith(_OPTIONAL_SUFFIX))
    unexpected = tuple(name for name in store.names if name not in expected)
    if missing or unexpected:
        return Misfit(missing, unexpected, None)
    for name, tensor in expected.items():
        if name in store and not is_lazy(tensor) and store.shape(name) != tensor.shape:
            return Misfit((), (), OtherShape(name, store.shape(name), tensor.shape))
    for name, tensor in expected.items():
        if name in store and _takes_weights(tensor.dtype) and not _takes_weights(store.dtype(name)):
            return Misfit((), (), None, OtherType(name, store.dtype(name)))
    return None


def _takes_weights(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


@final
class FittedStore(TensorStore):
    """A store in the order of an architecture, completed by the counters that its file lacks.

    Args:
        store: Gives the tensors; it must fit.
        expected: State dict of a fresh instance; its tensors may be on the meta device.
    """

    def __init__(self, store: TensorStore, expected: Mapping[str, Tensor]) -> None:
        self.store = store
        self._names = dict.fromkeys(expected)
        self._counters = {
            name: torch.zeros(tensor.shape, dtype=tensor.dtype)
            for name, tensor in expected.items()
            if name not in store
        }

    @property
    def names(self) -> Collection[str]:
        """Names of the tensors, in the order of the architecture."""
        return self._names.keys()

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of a tensor."""
        return self._counters[name].shape if name in self._counters else self.store.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Returns the type of a tensor's entries."""
        return self._counters[name].dtype if name in self._counters else self.store.dtype(name)

    def read(self, name: str) -> Tensor:
        """Returns a tensor."""
        return self._counters[name] if name in self._counters else self.store.read(name)

    def slice(self, name: str, start: int, stop: int) -> Tensor:
        """Returns a part of a tensor."""
        if name in self._counters:
            return self._counters[name][start:stop]
        return self.store.slice(name, start, stop)

    def digest(self) -> str:
        """Returns the SHA-256 of the file."""
        return self.store.digest()

    def close(self) -> None:
        """Closes the store that gives the tensors."""
        self.store.close()
        self._names, self._counters = {}, {}
