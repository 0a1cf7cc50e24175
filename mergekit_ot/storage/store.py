"""Where tensors come from and where they go: one at a time, by name."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Collection, Iterator, Mapping
from typing import Self, final, overload

import torch
from torch import Tensor


class TensorStore(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for.

    A store is also a mapping name → tensor, so that it goes wherever a state dict goes; iterating over its items
    reads one tensor after the other. Names, shapes and types are known without reading. A store can be pickled: one
    that stands in a file as its path, one that stands in memory as its tensors.

    Example:
        >>> with MemoryStore({"weight": torch.ones(3, 2)}) as store:
        ...     store.shape("weight"), store.dtype("weight"), store["weight"].sum().item()
        (torch.Size([3, 2]), torch.float32, 6.0)
    """

    @property
    @abc.abstractmethod
    def names(self) -> Collection[str]:
        """Names of the tensors, in order; membership is looked up, not searched."""

    @abc.abstractmethod
    def shape(self, name: str) -> torch.Size:
        """Returns the shape of a tensor.

        Raises:
            KeyError: There is no such tensor.
        """

    @abc.abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Returns the type of a tensor's entries.

        Raises:
            KeyError: There is no such tensor.
        """

    @abc.abstractmethod
    def read(self, name: str) -> Tensor:
        """Returns a tensor; whoever gets it must not write into it.

        Raises:
            KeyError: There is no such tensor.
        """

    @abc.abstractmethod
    def slice(self, name: str, start: int, stop: int) -> Tensor:
        """Returns the entries `start` to `stop` (not included) of a tensor along its first axis.

        Raises:
            KeyError: There is no such tensor.
            IndexError: The tensor is a scalar.
        """

    @abc.abstractmethod
    def digest(self) -> str:
        """Returns the SHA-256 of the file, or of all tensors where there is none."""

    @abc.abstractmethod
    def close(self) -> None:
        """Lets go of what it holds; it has no tensors afterwards. Closing again does nothing."""

    @final
    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    @final
    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    @final
    def __len__(self) -> int:
        return len(self.names)

    # That of a mapping would read the tensor.
    @final
    def __contains__(self, name: object) -> bool:
        return name in self.names

    @final
    def __enter__(self) -> Self:
        return self

    @final
    def __exit__(self, *_: object) -> None:
        self.close()


class StoreWriter(abc.ABC):
    """Takes tensors by name, one at a time, and keeps them.

    As a context manager it is closed at the end of the block; where the block raises, it is left unfinished.

    Example:
        >>> with MemoryWriter() as writer:
        ...     writer.write("bias", torch.zeros(2))
        >>> writer.reopened()["bias"]
        tensor([0., 0.])
    """

    @abc.abstractmethod
    def write(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor; every name once.

        Raises:
            CheckpointError: The tensor cannot be kept in this format, or writing failed.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Finishes; what was written is whole from here on. Closing again does nothing.

        Raises:
            CheckpointError: Writing failed.
        """

    @abc.abstractmethod
    def reopened(self) -> TensorStore:
        """Returns a store of what was written; to be asked once the writer is closed."""

    @final
    def __enter__(self) -> Self:
        return self

    @final
    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()


class AbstractHeldStore(TensorStore):
    """A store whose tensors stand in a mapping, in memory or mapped into it."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    @final
    @property
    def names(self) -> Collection[str]:
        """Names of the tensors, in order."""
        return self._state.keys()

    @final
    def shape(self, name: str) -> torch.Size:
        """Returns the shape of a tensor."""
        return self._state[name].shape

    @final
    def dtype(self, name: str) -> torch.dtype:
        """Returns the type of a tensor's entries."""
        return self._state[name].dtype

    @final
    def read(self, name: str) -> Tensor:
        """Returns a tensor; of a mapped file, only what is looked at is read."""
        return self._state[name]

    @final
    def slice(self, name: str, start: int, stop: int) -> Tensor:
        """Returns a view of a tensor's entries along its first axis."""
        return self._state[name][start:stop]

    @final
    def close(self) -> None:
        """Lets go of the tensors."""
        self._state = {}


@final
class MemoryStore(AbstractHeldStore):
    """A state in memory.

    Args:
        state: Name → tensor; it is kept, not copied.

    Example:
        >>> store = MemoryStore({"weight": torch.arange(6.0).reshape(3, 2)})
        >>> list(store), store.slice("weight", 1, 2).tolist()
        (['weight'], [[2.0, 3.0]])
    """

    def digest(self) -> str:
        """Returns the SHA-256 of names, types, shapes and entries."""
        return tensors_digest(self)

    def __reduce__(self) -> tuple[type[MemoryStore], tuple[dict[str, Tensor]]]:
        # A view would take the whole storage behind it along.
        return MemoryStore, ({name: compacted(tensor) for name, tensor in self._state.items()},)


@final
class MemoryWriter(StoreWriter):
    """Keeps tensors in memory as they are, without a copy."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        """Keeps a tensor."""
        self.state[name] = tensor

    def close(self) -> None:
        """Does nothing: what is in memory is whole."""

    def reopened(self) -> MemoryStore:
        """Returns a store of what was written."""
        return MemoryStore(self.state)


class StoreField:
    """A field of a dataclass that is given a store or a plain mapping of tensors, and holds a store."""

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...

    @overload
    def __get__(self, instance: object, owner: type) -> TensorStore: ...

    def __get__(self, instance: object | None, owner: type) -> Self | TensorStore:
        if instance is None:
            raise AttributeError(self._name)  # tells the dataclass that the field has no default
        return instance.__dict__[self._name]

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __set__(self, instance: object, state: Mapping[str, Tensor]) -> None:
        instance.__dict__[self._name] = as_store(state)


def as_store(state: Mapping[str, Tensor]) -> TensorStore:
    """Returns a state as a store; one that is a store already is returned as it is."""
    return state if isinstance(state, TensorStore) else MemoryStore(state)


def write_all(state: Mapping[str, Tensor], writer: StoreWriter) -> None:
    """Writes a state, one tensor at a time, and closes the writer."""
    with writer:
        for name, tensor in state.items():
            writer.write(name, tensor)


def tensors_digest(store: TensorStore) -> str:
    """Returns the SHA-256 of a store's names, types, shapes and entries, one tensor at a time.

    Example:
        >>> first, second = (MemoryStore({"weight": torch.ones(size)}) for size in (2, 3))
        >>> tensors_digest(first) == tensors_digest(second)
        False
    """
    digest = hashlib.sha256()
    for name in store.names:
        digest.update(f"{name} {store.dtype(name)} {tuple(store.shape(name))}\n".encode())
        entries = store.read(name).detach().cpu().contiguous().reshape(-1)
        digest.update(entries.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def compacted(tensor: Tensor) -> Tensor:
    """Detaches a tensor; a view is copied, because what is written is the whole storage behind it."""
    tensor = tensor.detach().cpu()
    is_view = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
    return tensor.clone() if is_view else tensor
