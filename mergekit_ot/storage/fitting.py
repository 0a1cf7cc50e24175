"""A state and the architecture that it is to be loaded into: whether they fit, without reading a tensor."""

from __future__ import annotations

import types
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from mergekit_ot.storage.store import TensorStore

# A counter that older files lack; it takes no part in the function at evaluation.
_OPTIONAL_SUFFIX = "num_batches_tracked"
# Name → all names, itself among them, under which an architecture has the same tensor.
Ties = Mapping[str, tuple[str, ...]]


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


def misfit(
    store: TensorStore,
    expected: Mapping[str, Tensor],
    ties: Ties = types.MappingProxyType({}),
    ignored: Collection[str] = (),
) -> Misfit | None:
    """Returns how a state differs from the state dict of an architecture, or None where it fits.

    Args:
        store: The state.
        expected: State dict of a fresh instance; its tensors may be on the meta device.
        ties: Name → all names under which the architecture has the same tensor; one of them is enough.
        ignored: Names that the state may have besides.

    Example:
        >>> from mergekit_ot.storage.store import MemoryStore
        >>> misfit(MemoryStore({"bias": torch.zeros(2)}), {"weight": torch.zeros(2, 3)}).missing
        ('weight',)
    """
    filled = filled_names(store, expected, ties)
    lacking = (name for name in expected if name not in store and name not in filled)
    missing = tuple(name for name in lacking if not is_optional(name))
    unexpected = tuple(name for name in store.names if name not in expected and name not in ignored)
    if missing or unexpected:
        return Misfit(missing, unexpected, None)
    for name, tensor in expected.items():
        if name in store and not is_lazy(tensor) and store.shape(name) != tensor.shape:
            return Misfit((), (), OtherShape(name, store.shape(name), tensor.shape))
    for name, tensor in expected.items():
        if name in store and _takes_weights(tensor.dtype) and not _takes_weights(store.dtype(name)):
            return Misfit((), (), None, OtherType(name, store.dtype(name)))
    return None


def is_optional(name: str) -> bool:
    """Returns whether a file may lack a tensor: a counter that takes no part in the function."""
    return name.endswith(_OPTIONAL_SUFFIX)


def filled_names(store: TensorStore, expected: Mapping[str, Tensor], ties: Ties) -> dict[str, str]:
    """Returns name → name in the state, for tensors that the state has under another name only.

    Args:
        store: The state.
        expected: State dict of a fresh instance.
        ties: Name → all names under which the architecture has the same tensor.

    Example:
        >>> from mergekit_ot.storage.store import MemoryStore
        >>> both = {name: torch.zeros(5, 2) for name in ("embedding.weight", "head.weight")}
        >>> filled_names(MemoryStore({"embedding.weight": torch.zeros(5, 2)}), both, dict.fromkeys(both, tuple(both)))
        {'head.weight': 'embedding.weight'}
    """
    partners = {name: [other for other in ties.get(name, ()) if other in store] for name in expected}
    return {name: others[0] for name, others in partners.items() if name not in store and others}


def _takes_weights(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


@final
class FittedStore(TensorStore):
    """A store in the order of an architecture, completed by what its file lacks: tied tensors, and counters.

    Args:
        store: Gives the tensors; it must fit.
        expected: State dict of a fresh instance; its tensors may be on the meta device.
        ties: Name → all names under which the architecture has the same tensor.
    """

    def __init__(
        self, store: TensorStore, expected: Mapping[str, Tensor], ties: Ties = types.MappingProxyType({})
    ) -> None:
        self.store = store
        self.filled = filled_names(store, expected, ties)
        self._names = dict.fromkeys(expected)
        self._counters = {
            name: torch.zeros(tensor.shape, dtype=tensor.dtype)
            for name, tensor in expected.items()
            if name not in store and name not in self.filled
        }

    @property
    def names(self) -> Collection[str]:
        """Names of the tensors, in the order of the architecture."""
        return self._names.keys()

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of a tensor."""
        return self._counters[name].shape if name in self._counters else self.store.shape(self._held(name))

    def dtype(self, name: str) -> torch.dtype:
        """Returns the type of a tensor's entries."""
        return self._counters[name].dtype if name in self._counters else self.store.dtype(self._held(name))

    def read(self, name: str) -> Tensor:
        """Returns a tensor."""
        return self._counters[name] if name in self._counters else self.store.read(self._held(name))

    def slice(self, name: str, start: int, stop: int) -> Tensor:
        """Returns a part of a tensor."""
        if name in self._counters:
            return self._counters[name][start:stop]
        return self.store.slice(self._held(name), start, stop)

    def _held(self, name: str) -> str:
        return self.filled.get(name, name)

    def digest(self) -> str:
        """Returns the SHA-256 of the file."""
        return self.store.digest()

    def close(self) -> None:
        """Closes the store that gives the tensors."""
        self.store.close()
        self._names, self._counters, self.filled = {}, {}, {}
