"""Checkpoints in the safetensors format: tensors and text, no code, read when they are needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_ot import hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_ot import Checkpoint


@hookimpl
def mergeot_load_checkpoint(path: Path) -> Checkpoint | None:
    """Return the checkpoint where `path` is a safetensors file."""
    from mergeot_safetensors.files import is_safetensors, load

    return load(path) if is_safetensors(path) else None


@hookimpl
def mergeot_save_checkpoint(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bool | None:
    """Write a safetensors file where `path` ends in ``.safetensors``."""
    from mergeot_safetensors.files import SUFFIX, SafetensorsWriter

    if path.suffix != SUFFIX:
        return None
    with SafetensorsWriter(path, metadata) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor)
    return True
