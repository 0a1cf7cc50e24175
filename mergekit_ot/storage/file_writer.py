"""Writers of formats that are written at once."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from torch import Tensor

from mergekit_ot.storage.store import StoreWriter, compacted


class AbstractFileWriter(StoreWriter):
    """Writes one file at once, when it is closed: for formats that begin with a table of all tensors.

    Args:
        path: The file.
        metadata: Plain data: what the file says about the state.

    Example:
        >>> import pathlib, tempfile, torch
        >>> from mergekit_ot import MemoryStore
        >>> class NamesWriter(AbstractFileWriter):
        ...     def save(self, state):
        ...         self.path.write_text(" ".join(state))
        ...
        ...     def reopened(self):
        ...         return MemoryStore({name: torch.zeros(0) for name in self.path.read_text().split()})
        >>> writer = NamesWriter(pathlib.Path(tempfile.mkdtemp()) / "names.txt", {})
        >>> with writer:
        ...     writer.write("weight", torch.ones(2))
        >>> list(writer.reopened())
        ['weight']
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path, self.metadata = path, metadata
        self._state: dict[str, Tensor] = {}
        self._is_closed = False

    @final
    def write(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor as it is now; a view is copied."""
        self._state[name] = compacted(tensor)

    @final
    def close(self) -> None:
        """Writes the file.

        Raises:
            CheckpointError: The format does not hold a tensor, or writing failed.
        """
        if not self._is_closed:
            self.save(self._state)
            self._is_closed = True
            self._state = {}

    @abc.abstractmethod
    def save(self, state: Mapping[str, Tensor]) -> None:
        """Writes all tensors and the metadata to the path.

        Raises:
            CheckpointError: The format does not hold a tensor, or writing failed.
        """
