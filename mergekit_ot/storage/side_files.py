"""Files beside checkpoints that have no room for it: how the weights were made, and what architecture they belong to.

``fused.pt`` is described by ``fused.pt.json``. It holds the digest of the file that it describes, and says nothing of
another one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mergekit_ot.errors import CheckpointError
from mergekit_ot.storage.array_files import SUFFIX as ARRAYS
from mergekit_ot.storage.array_files import ArraysForm
from mergekit_ot.storage.files import file_digest, json_text
from mergekit_ot.storage.forms import AbstractForm
from mergekit_ot.storage.limits import HEADER_BYTES
from mergekit_ot.storage.marks import JSON_KEY, is_ours
from mergekit_ot.storage.outputs import check_output
from mergekit_ot.storage.record import FORMAT, Checkpoint, carried_by
from mergekit_ot.storage.regular import read_bounded

_DIGEST = "sha256"


def side_file(path: Path) -> Path:
    """Returns the file that describes another one.

    Example:
        >>> side_file(Path("models/fused.pt")).name
        'fused.pt.json'
    """
    return path.with_name(f"{path.name}.json")


def side_of(path: Path, template: Checkpoint | None) -> Path | None:
    """Returns the file that will describe a checkpoint written to `path`, or None where that one describes itself.

    Args:
        path: The checkpoint.
        template: Gives the form in which it is written.
    """
    form = form_of(path, template)
    return None if form is None or form.has_room(path) else side_file(path)


def form_of(path: Path, template: Checkpoint | None) -> AbstractForm | None:
    """Returns the form in which a checkpoint is written to `path`, where no other format goes by its name.

    Args:
        path: The checkpoint.
        template: Gives the form; None where it is a file of mergeot's own.
    """
    # A folder's form makes no file.
    form = None if template is None or (template.form is not None and template.form.is_folder) else template.form
    return ArraysForm() if path.suffix == ARRAYS and (form is None or not form.suits(path)) else form


def check_side(path: Path, template: Checkpoint | None, inputs: Iterable[str | Path], *, overwrite: bool) -> None:
    """Checks that the file beside a checkpoint can be written, where one will be.

    Raises:
        CheckpointError: It stands in the way of something else.
    """
    side = side_of(path, template)
    if side is not None:
        check_output(side, inputs, overwrite=overwrite)


def side_text(path: Path, metadata: Mapping[str, Any]) -> str:
    """Returns what the file beside a checkpoint says.

    Args:
        path: The checkpoint, as it was written.
        metadata: Plain data.
    """
    from mergekit_ot import __version__

    made = {JSON_KEY: f"{FORMAT} {__version__}", **metadata, _DIGEST: file_digest(path)}
    return json_text(made)


def described(checkpoint: Checkpoint) -> Checkpoint:
    """Returns a checkpoint with what the file beside it says, where there is one of mergeot, and it means this file.

    Raises:
        CheckpointError: A value in that file has the wrong type.
    """
    form, side = checkpoint.form, side_file(checkpoint.path)
    if form is None or form.has_room(checkpoint.path):
        return checkpoint
    said = _read(side)
    if said is None:
        return checkpoint
    if said.get(_DIGEST) != checkpoint.sha256:
        note = f"{checkpoint.found}; '{side.name}' beside it describes another file and is not read"
        return dataclasses.replace(checkpoint, found=note)
    carried = carried_by(side, said)
    named = f", architecture '{carried['architecture']}'" if carried["architecture"] else ""
    note = f"{checkpoint.found}; made by mergekit_ot, as '{side.name}' says{named}"
    return dataclasses.replace(checkpoint, found=note, **carried)


def _read(side: Path) -> dict[str, Any] | None:
    try:
        if not side.is_file() or not is_ours(side) or side.stat().st_size > HEADER_BYTES.value:
            return None
        content = json.loads(read_bounded(side, HEADER_BYTES.value).decode("utf-8"))
    except (OSError, ValueError, RecursionError, CheckpointError):
        return None  # the weights are whole without it
    return content if isinstance(content, dict) else None
