"""Exported programs (``.pt2``, written by ``torch.export.save``): a checkpoint that needs no architecture, if trusted.

Loading a program can run code that stands in its file. Of a file that the user does not trust only the raw weights are
read, by a reader of our own; its program is neither read nor written on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_ot import hookimpl
from mergekit_ot.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_ot import Checkpoint

SUFFIX = ".pt2"


@hookimpl
def mergeot_load_checkpoint(path: Path, is_trusted: bool) -> Checkpoint | None:
    """Return the checkpoint where `path` ends in ``.pt2``: its program too if it is trusted, else its weights alone."""
    if path.suffix != SUFFIX or not path.is_file():
        return None
    if is_trusted:
        from mergeot_exported.programs import load_program

        return load_program(path)
    from mergeot_exported.weights import load_weights

    return load_weights(path)


@hookimpl
def mergeot_check_output(path: Path, template: Checkpoint | None) -> None:
    """Refuse a ``.pt2`` where no trusted program is there to write on."""
    if path.suffix != SUFFIX:
        return
    advice = "Choose another extension, such as .pt"
    if template is None or template.path.suffix != SUFFIX:
        raise CheckpointError(
            f"A {SUFFIX} file holds a program, and the source whose sizes the result takes is none. "
            f"{advice}, or an exported program as the target."
        )
    if template.build is None:
        raise CheckpointError(
            f"'{path}' would hold the program of '{template.path}', which is not trusted, and whoever loads it may run "
            f"what stands in it. Pass --trust {template.path} if you trust who made that file. {advice}, if not."
        )


@hookimpl
def mergeot_save_checkpoint(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bool | None:
    """Write the program of the source with a new state where `path` ends in ``.pt2``."""
    if path.suffix != SUFFIX:
        return None
    from mergeot_exported.programs import save

    save(path, state, metadata)
    return True
