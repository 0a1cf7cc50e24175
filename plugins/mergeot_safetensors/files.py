"""Reading and writing safetensors files; the metadata stand as one JSON text in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_ot import Checkpoint
from mergekit_ot.errors import CheckpointError

SUFFIX = ".safetensors"
_KEY = "mergekit_ot"
_NEWEST_VERSION = 1
_LENGTH_BYTES = 8
# A file that was only renamed to .safetensors is what its first bytes say: an archive or a pickle.
_OTHER_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")


def is_safetensors(path: Path) -> bool:
    """Returns whether a file is one by its first bytes, or is called one and its first bytes do not object."""
    with path.open("rb") as stream:
        start = stream.read(_LENGTH_BYTES + 1)
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if start[_LENGTH_BYTES:] == b"{" and length <= path.stat().st_size - _LENGTH_BYTES:
        return True
    return path.suffix == SUFFIX and not start.startswith(_OTHER_MAGIC)


def load(path: Path) -> Checkpoint:
    """Reads a safetensors file; the tensors are mapped into memory, not read.

    Raises:
        CheckpointError: The file is truncated or damaged, holds no tensor, or is of a newer version.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            texts = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"'{path}' is not a safetensors file, or it was truncated or damaged ({error}). Copy or download it again."
        ) from error
    if not state:
        raise CheckpointError(f"'{path}' is a safetensors file without tensors. Name one that holds a state dict.")
    kept = _metadata(path, texts)
    architecture, shape = kept.get("architecture"), kept.get("input_shape")
    written = ", written by mergekit_ot" if kept else ""
    carried = f", architecture '{architecture}'" if architecture else ""
    return Checkpoint(
        path,
        state,
        architecture=architecture,
        arguments=dict(kept.get("arguments") or {}),
        input_shape=None if shape is None else tuple(shape),
        found=f"safetensors file with {len(state)} tensors{written}{carried}",
        provenance=dict(kept.get("provenance") or {}),
    )


def save(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes a state and plain metadata.

    Raises:
        CheckpointError: A tensor has a type or layout that the format does not hold, or writing failed.
    """
    # The format refuses tensors that share memory and views with gaps; tied weights are written twice.
    separate = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    texts = {"format": "pt", _KEY: json.dumps({key: value for key, value in metadata.items() if key != "template"})}
    try:
        save_file(separate, path, metadata=texts)
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"Cannot write '{path}' as safetensors ({error}). Give an output with .pt.") from error


def _metadata(path: Path, texts: Mapping[str, str]) -> dict[str, Any]:
    if _KEY not in texts:
        return {}
    try:
        kept = json.loads(texts[_KEY])
    except ValueError as error:
        raise CheckpointError(f"The header of '{path}' is damaged ({error}). Write the file again.") from error
    if not isinstance(kept, dict):
        raise CheckpointError(f"The header of '{path}' is damaged: its metadata are no mapping. Write the file again.")
    if kept.get("version", _NEWEST_VERSION) > _NEWEST_VERSION:
        raise CheckpointError(f"'{path}' was written by a newer version of mergekit_ot. Update the package to read it.")
    return kept
