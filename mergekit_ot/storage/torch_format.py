"""Files that torch.save writes, new and legacy: read without executing anything."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from mergekit_ot.errors import CheckpointError
from mergekit_ot.storage.file_writer import AbstractFileWriter
from mergekit_ot.storage.files import file_digest
from mergekit_ot.storage.record import FORMAT, VERSION, Checkpoint
from mergekit_ot.storage.state_dicts import find_state, foreign_globals
from mergekit_ot.storage.store import AbstractHeldStore, TensorStore
from mergekit_ot.storage.torch_stream import torch_stream

_ZIP_MAGIC = b"PK\x03\x04"

# The first bytes of files that hold weights which cannot be read here, and the way out.
_OTHER_FORMATS = {
    b"GGUF": "It is a GGUF file: quantised weights for inference. Fuse the original (unquantised) checkpoints, "
    "then convert the fused one.",
    b"\x89HDF": "It is an HDF5 (Keras) file. Load it in its framework and save the weights as a PyTorch state dict.",
}

_RESAVE = (
    "It was not executed. If you trust it, load it in the code it was made with and re-save the weights alone: "
    "torch.save(model.state_dict(), 'weights.pt')."
)


@final
class TorchStore(AbstractHeldStore):
    """The state dict in a file of torch: mapped into memory and read when needed, or read whole (legacy files).

    Args:
        path: The file.
        state: What was found in it.
        sha256: The file's digest, where it was taken as the file was read.
    """

    def __init__(self, path: Path, state: Mapping[str, Tensor], sha256: str | None = None) -> None:
        super().__init__(dict(state))
        self.path, self._sha256 = path, sha256

    def digest(self) -> str:
        """Returns the SHA-256 of the file."""
        if self._sha256 is None:
            self._sha256 = file_digest(self.path)
        return self._sha256

    def __reduce__(self) -> tuple[Callable[[Path, str | None], TorchStore], tuple[Path, str | None]]:
        return _reopened, (self.path.absolute(), self._sha256)


def _reopened(path: Path, sha256: str | None) -> TorchStore:
    return TorchStore(path, read_torch_file(path).state, sha256)


@final
class TorchWriter(AbstractFileWriter):
    """Writes a state with its metadata as a file of torch."""

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Writes the file."""
        # Given a path, torch writes its name into the file, which would then differ from name to name.
        with torch_stream(self.path) as stream:
            torch.save({**self.metadata, "state_dict": dict(state)}, stream)

    def reopened(self) -> TensorStore:
        """Returns a store of the file."""
        return read_torch_file(self.path).state


def read_torch_file(path: Path) -> Checkpoint:
    """Reads what ``torch.save`` writes, bare or inside the wrappers of training scripts.

    Raises:
        CheckpointError: The file is truncated, carries code, or holds no tensor.
    """
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic in _OTHER_FORMATS:
        raise CheckpointError(f"'{path}' cannot be fused. {_OTHER_FORMATS[magic]}")
    if not magic:
        raise CheckpointError(f"'{path}' is empty: it was truncated while it was written or copied. Copy it again.")
    if magic == _ZIP_MAGIC:
        if not zipfile.is_zipfile(path):
            raise CheckpointError(
                f"'{path}' is truncated: the end of the archive is missing. Copy or download it again."
            )
        return _from_content(path, _loaded(path, path, is_mapped=True), None)
    # A legacy file cannot be mapped: it is read whole, and its digest is taken from what was read.
    whole = path.read_bytes()
    return _from_content(path, _loaded(path, io.BytesIO(whole)), hashlib.sha256(whole).hexdigest())


def _loaded(path: Path, file: Path | io.BytesIO, is_mapped: bool = False) -> object:
    try:
        with _plain_data_allowed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_mapped)
    except Exception as error:
        raise CheckpointError(_diagnosis(path, error)) from error


def _plain_data_allowed() -> contextlib.AbstractContextManager[object]:
    """Lets settings and measured numbers that training scripts store beside the weights load as plain data."""
    kinds = [np.dtypes.BoolDType, *(type(np.dtype(kind)) for kind in ("i4", "i8", "f2", "f4", "f8", "U1"))]
    functions = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(1).__reduce__()[0]}
    # NumPy moved its core: files name a function by the place where it was when they were written.
    moved = []
    for name, function in functions.items():
        moved += [(function, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")]
    return torch.serialization.safe_globals([argparse.Namespace, np.dtype, np.ndarray, *kinds, *moved])  # type: ignore[list-item]


def _diagnosis(path: Path, error: Exception) -> str:
    if "TorchScript" in str(error):
        return f"'{path}' is a TorchScript archive: a program, not a state dict. {_RESAVE}"
    foreign = foreign_globals(path)
    if foreign:
        wanted = ", ".join(foreign[:4]) + (" …" if len(foreign) > 4 else "")
        return f"'{path}' carries code: its pickle wants to load {wanted}. {_RESAVE}"
    if path.suffix == ".safetensors":
        return f"'{path}' was read by no plugin. Install the safetensors plugin, or see 'mergeot plugins'."
    return _damage(path, error)


def _damage(path: Path, error: Exception) -> str:
    """Returns the sentence for a file that carries nothing foreign and still cannot be read."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, EOFError) or "unexpected EOF" in lines[0] or "truncated" in str(error):
        return f"'{path}' is truncated: the file ends before its tensors do. Copy or download it again."
    return (
        f"'{path}' is not a PyTorch checkpoint, or it is damaged ({lines[-1] if len(lines) > 1 else lines[0]}). "
        "Expected a file written by torch.save(model.state_dict(), path)."
    )


def _from_content(path: Path, content: object, sha256: str | None) -> Checkpoint:
    if isinstance(content, Mapping) and content.get("format") == FORMAT:
        return _own_format(path, content, sha256)
    held = find_state(content)
    if held is None:
        kind = type(content).__name__
        keys = f" with the keys {', '.join(map(str, list(content)[:8]))}" if isinstance(content, Mapping) else ""
        raise CheckpointError(
            f"'{path}' holds no state dict: it is a {kind}{keys}, and no mapping in it holds tensors by name. "
            "Save the weights with torch.save(model.state_dict(), path)."
        )
    return Checkpoint(path, TorchStore(path, held.state, sha256), found=held.sentence)


def _own_format(path: Path, content: Mapping[str, Any], sha256: str | None) -> Checkpoint:
    if content.get("version", VERSION) > VERSION:
        raise CheckpointError(f"'{path}' was written by a newer version of mergekit_ot. Update the package to read it.")
    state = dict(content.get("state_dict") or {})
    if not state:
        raise CheckpointError(f"'{path}' was written by mergekit_ot but holds no tensor. Write it again.")
    architecture, shape = content.get("architecture"), content.get("input_shape")
    carried = f", architecture '{architecture}'" if architecture else ""
    return Checkpoint(
        path,
        TorchStore(path, state, sha256),
        architecture=architecture,
        arguments=dict(content.get("arguments") or {}),
        input_shape=None if shape is None else tuple(shape),
        found=f"state dict with {len(state)} tensors, written by mergekit_ot{carried}",
        provenance=dict(content.get("provenance") or {}),
    )
