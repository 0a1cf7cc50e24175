"""What was read from a checkpoint."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, final

from annotated_types import Ge, MinLen
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from mergekit_ot.errors import CheckpointError
from mergekit_ot.storage.files import file_digest
from mergekit_ot.storage.forms import AbstractForm
from mergekit_ot.storage.limits import INPUT_NUMBERS, NAME_LENGTH, shortened
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
        form: How a state that belongs to it is written as this one was; None where that is a file of mergeot's own.
        key: The keys that lead to the state in the file, joined by points; empty at the top level.
        alternatives: Key → what reads another state dict that stands in the same file.

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
    form: AbstractForm | None = None
    key: str = ""
    alternatives: Mapping[str, Callable[[], Checkpoint]] = field(default_factory=dict)

    @functools.cached_property
    def sha256(self) -> str:
        """Digest of the file, or that of a folder's store; taken when it is first asked for, if not on the way."""
        is_of_file = isinstance(self.state, MemoryStore) and self.path.is_file()
        return file_digest(self.path) if is_of_file else self.state.digest()


@final
class _Metadata(BaseModel):
    """What a file that was written here says about its state."""

    model_config = ConfigDict(strict=True)

    version: Annotated[int, Ge(1)] = VERSION
    architecture: str | None = None
    arguments: dict[str, Any] | None = None
    input_shape: Annotated[list[Annotated[int, Ge(1)]], MinLen(1)] | None = None
    provenance: dict[str, Any] | None = None


def carried_by(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a file's own metadata say, as keywords of `Checkpoint`; every type in them is checked.

    Args:
        path: The file, for messages.
        metadata: What it says.

    Raises:
        CheckpointError: A newer version wrote it, or a value has the wrong type: names file and key.

    Example:
        >>> carried_by(Path("net.pt"), {"architecture": "mlp", "input_shape": [4]})["input_shape"]
        (4,)
        >>> carried_by(Path("net.pt"), {"architecture": 5})
        Traceback (most recent call last):
        mergekit_ot.errors.CheckpointError: Key 'architecture' in the metadata of 'net.pt' is 5: input should be ...
    """
    given: dict[str, Any] = {
        str(key): list(value) if isinstance(value, tuple) else value for key, value in metadata.items()
    }
    try:
        kept = _Metadata(**{key: value for key, value in given.items() if key in _Metadata.model_fields})
    except ValidationError as failure:
        problem = failure.errors(include_url=False)[0]
        key = ".".join(map(str, problem["loc"]))
        raise CheckpointError(
            f"Key '{shortened(key)}' in the metadata of '{path}' is {shortened(problem['input'])}: "
            f"{problem['msg'][0].lower()}{problem['msg'][1:]}. Write the file again with mergeot."
        ) from failure
    if kept.version > VERSION:
        raise CheckpointError(f"'{path}' was written by a newer version of mergekit_ot. Update the package to read it.")
    NAME_LENGTH.check(len(kept.architecture or ""), f"Key 'architecture' in the metadata of '{path}' has")
    if kept.input_shape is not None:
        INPUT_NUMBERS.check(math.prod(kept.input_shape), f"Key 'input_shape' in the metadata of '{path}' asks for")
    return {
        "architecture": kept.architecture,
        "arguments": kept.arguments or {},
        "input_shape": None if kept.input_shape is None else tuple(kept.input_shape),
        "provenance": kept.provenance or {},
    }
