"""The state of a network with blocks that compute nothing: its own tensors under other names, and zeros."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import final

import torch
from torch import Tensor

from mergekit_ot.storage.store import TensorStore


@final
class DeepenedStore(TensorStore):
    """A store in which tensors stand under the names of a deeper network, and zeros where it has more blocks.

    Args:
        store: Gives the tensors.
        held: Name → name in the store; in the order of the deeper network together with the others.
        zeros: Name → tensor whose shape and type the zeros have.
        given: Name → tensor of the deeper network that is taken as it is.
        order: All names.

    Example:
        >>> from mergekit_ot.storage.store import MemoryStore
        >>> own = MemoryStore({"0.weight": torch.ones(2)})
        >>> names, zeros = ["0.weight", "1.weight"], {"0.weight": torch.ones(2)}
        >>> deep = DeepenedStore(own, {"1.weight": "0.weight"}, zeros, {}, names)
        >>> {name: tensor.tolist() for name, tensor in deep.items()}
        {'0.weight': [0.0, 0.0], '1.weight': [1.0, 1.0]}
    """

    def __init__(
        self,
        store: TensorStore,
        held: Mapping[str, str],
        zeros: Mapping[str, Tensor],
        given: Mapping[str, Tensor],
        order: Collection[str],
    ) -> None:
        self.store, self.held, self.given = store, held, given
        self.zeros = {name: (like.shape, like.dtype) for name, like in zeros.items()}
        self._names = dict.fromkeys(name for name in order if name in held or name in zeros or name in given)

    @property
    def names(self) -> Collection[str]:
        """Names of the tensors, in the order of the deeper network."""
        return self._names.keys()

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of a tensor."""
        if name in self.held:
            return self.store.shape(self.held[name])
        return self.zeros[name][0] if name in self.zeros else self.given[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Returns the type of a tensor's entries."""
        if name in self.held:
            return self.store.dtype(self.held[name])
        return self.zeros[name][1] if name in self.zeros else self.given[name].dtype

    def read(self, name: str) -> Tensor:
        """Returns a tensor."""
        if name in self.held:
            return self.store.read(self.held[name])
        if name in self.zeros:
            shape, dtype = self.zeros[name]
            return torch.zeros(shape, dtype=dtype)
        return self.given[name]

    def slice(self, name: str, start: int, stop: int) -> Tensor:
        """Returns a part of a tensor."""
        if name in self.held:
            return self.store.slice(self.held[name], start, stop)
        return self.read(name)[start:stop]

    def digest(self) -> str:
        """Returns the SHA-256 of the store that gives the tensors."""
        return self.store.digest()

    def close(self) -> None:
        """Closes the store that gives the tensors."""
        self.store.close()
        self._names = {}
