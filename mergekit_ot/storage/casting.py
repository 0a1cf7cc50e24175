"""A store whose numbers are read in other types than they stand in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import final

import torch
from torch import Tensor

from mergekit_ot.errors import CheckpointError, RecipeError, unknown_name
from mergekit_ot.storage.finite import is_finite
from mergekit_ot.storage.store import TensorStore

# What files of weights are written in, by the names that users give.
NUMBER_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def number_type(name: str) -> torch.dtype:
    """Returns the type of a name.

    Raises:
        RecipeError: It is none that files of weights are written in.

    Example:
        >>> number_type("bfloat16")
        torch.bfloat16
    """
    if name not in NUMBER_TYPES:
        raise RecipeError(unknown_name("dtype", name, NUMBER_TYPES))
    return NUMBER_TYPES[name]


def in_type(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Returns a state with its floating-point numbers in another type; whole and complex numbers stay.

    Args:
        state: Name → tensor.
        name: Of the type.

    Raises:
        CheckpointError: A tensor is too large for that type.
    """
    kind = number_type(name)
    cast = {key: value.to(kind) if value.is_floating_point() else value for key, value in state.items()}
    for key, value in cast.items():
        if not is_finite(value) and is_finite(state[key]):
            raise CheckpointError(f"'{key}' holds numbers that {name} cannot. Choose another dtype, such as bfloat16.")
    return cast


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
