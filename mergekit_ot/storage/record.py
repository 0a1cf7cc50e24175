"""What was read from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    pass


FORMAT = "mergekit_ot"


VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """A state dict and what its file says about it.

    Attributes:
        path: The file.
        state: Name → tensor, on the CPU; large files are mapped into memory and read when needed.
        architecture: Name of the registered architecture, where the file carries one.
        arguments: Keyword arguments of that architecture.
        input_shape: Shape of one input without the batch axis.
        found: A sentence: what was found in the file.
        sha256: Digest of the file.
        provenance: How the file was made, where it says so.
        build: Builds the module, where the file holds the program itself.
        example_inputs: Inputs of that program.

    Example:
        What a reader of a format returns (hook ``mergeot_load_checkpoint``):

        >>> import torch
        >>> checkpoint = Checkpoint(Path("net.npw"), {"weight": torch.zeros(2, 3)}, found="one array")
        >>> checkpoint.architecture is None
        True
    """

    path: Path
    state: Mapping[str, Tensor]
    architecture: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    input_shape: tuple[int, ...] | None = None
    found: str = ""
    sha256: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    build: Callable[[], nn.Module] | None = None
    example_inputs: tuple[Tensor, ...] | None = None
