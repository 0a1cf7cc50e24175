"""What was read from a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mergekit_ot.storage.files import file_digest
from mergekit_ot.storage.store import MemoryStore, StoreField

FORMAT = "mergekit_ot"
VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """A state dict and what its file says about it.

    Attributes:
        path: The file, or the folder of a format that has several.
        state: The tensors, on the CPU, read when needed (a `TensorStore`, which is a mapping name → tensor); a plain
            mapping that was read whole from the file may be given.
        architecture: Name of the registered architecture, where the file carries one.
        arguments: Keyword arguments of that architecture.
        input_shape: Shape of one input without the batch axis.
        found: A sentence: what was found in the file.
        provenance: How the file was made, where it says so.
        build: Builds the module, where the file holds the program itself and is trusted.
        example_inputs: Inputs of that program.
        has_untouched_program: Whether the file holds a program that was not read, because the file is not trusted.

    Example:
        What a reader of a format returns (hook ``mergeot_load_checkpoint``):

        >>> import torch
        >>> checkpoint = Checkpoint(Path("net.npw"), {"weight": torch.zeros(2, 3)}, found="one array")
        >>> checkpoint.architecture is None
        True
    """

    path: Path
    state: StoreField = StoreField()  # noqa: RUF009 - a descriptor, which is no default
    architecture: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    input_shape: tuple[int, ...] | None = None
    found: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    build: Callable[[], nn.Module] | None = None
    example_inputs: tuple[Tensor, ...] | None = None
    has_untouched_program: bool = False

    @functools.cached_property
    def sha256(self) -> str:
        """Digest of the file, or that of a folder's store; taken when it is first asked for, if not on the way."""
        is_of_file = isinstance(self.state, MemoryStore) and self.path.is_file()
        return file_digest(self.path) if is_of_file else self.state.digest()
