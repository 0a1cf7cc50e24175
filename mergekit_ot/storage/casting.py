"""A store whose numbers are read in other types than they stand in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import final

import torch
from torch import Tensor

from mergekit_ot.errors import CheckpointError
from mergekit_ot.storage.finite import is_finite
from mergekit_ot.storage.store import TensorStore


@final
class CastStore(TensorStore):
    """A store of which some tensors are read in another type.

    Args:
        store: Gives the tensors.
        kinds: Name → type, of those that are cast.
        owner: Whose tensors they are, for the message.
    """

    def __init__(self, store: TensorStore, kinds: Mapping[str, torch.dtype], owner: str) -> None:
        self.store, self.kinds, self.owner = store, dict(kinds), owner

    @property
    def names(self) -> Collection[str]:
        """Names of the tensors, in order."""
        return self.store.names

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of a tensor."""
        return self.store.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Returns the type in which a tensor is read."""
        return self.kinds.get(name) or self.store.dtype(name)

    def read(self, name: str) -> Tensor:
        """Returns a tensor in its type.

        Raises:
            CheckpointError: It is too large for that type.
        """
        return self._cast(self.store.read(name), name)

    def slice(self, name: str, start: int, stop: int) -> Tensor:
        """Returns a part of a tensor in its type.

        Raises:
            CheckpointError: It is too large for that type.
        """
        return self._cast(self.store.slice(name, start, stop), name)

    def _cast(self, tensor: Tensor, name: str) -> Tensor:
        if name not in self.kinds:
            return tensor
        cast = tensor.to(self.kinds[name])
        if not is_finite(cast) and is_finite(tensor):
            kind = str(self.kinds[name]).removeprefix("torch.")
            raise CheckpointError(
                f"'{name}' of {self.owner} holds numbers that {kind} cannot, and the fusion has that type, which is "
                "the first source's. Name this source first."
            )
        return cast

    def digest(self) -> str:
        """Returns the SHA-256 of what stands in the store."""
        return self.store.digest()

    def close(self) -> None:
        """Closes the store that gives the tensors."""
        self.store.close()
