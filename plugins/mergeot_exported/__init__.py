"""Exported programs (``.pt2``, written by ``torch.export.save``): a checkpoint that needs no architecture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_ot import hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_ot import Checkpoint

SUFFIX = ".pt2"


@hookimpl
def mergeot_load_checkpoint(path: Path) -> Checkpoint | None:
    """Return the checkpoint where `path` ends in ``.pt2``."""
    if path.suffix != SUFFIX or not path.is_file():
        return None
    from mergeot_exported.programs import load

    return load(path)


@hookimpl
def mergeot_save_checkpoint(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bool | None:
    """Write the program of the source with a new state where `path` ends in ``.pt2``."""
    if path.suffix != SUFFIX:
        return None
    from mergeot_exported.programs import save

    save(path, state, metadata)
    return True
