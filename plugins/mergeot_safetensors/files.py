"""Reading and writing safetensors files; the metadata stand as one JSON text in the header."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mergekit_ot import (
    AbstractFileWriter,
    AbstractForm,
    Checkpoint,
    MappedFile,
    TensorStore,
    carried_by,
    torch_stream,
)
from mergekit_ot.errors import CheckpointError
from mergeot_safetensors.header import LENGTH_BYTES, read_header

SUFFIX = ".safetensors"
_KEY = "mergekit_ot"
_LENGTH_BYTES = 8
# How the library, which is no Python, tells that the system could not write.
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
# A file that was only renamed to .safetensors is what its first bytes say: an archive or a pickle.
_OTHER_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")


def is_safetensors(path: Path) -> bool:
    """Returns whether a file is one by its first bytes, or is called one and its first bytes do not object."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        start = stream.read(LENGTH_BYTES + 1)
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if start[LENGTH_BYTES:] == b"{" and length <= path.stat().st_size - LENGTH_BYTES:
        return True
    return path.suffix == SUFFIX and not start.startswith(_OTHER_MAGIC)


@final
class SafetensorsStore(TensorStore):
    """The tensors of a safetensors file, mapped into memory; each is read when it is asked for.

    Args:
        path: The file.
        sha256: Its digest, where it is known.

    Raises:
        CheckpointError: The file is truncated or damaged.
    """

    def __init__(self, path: Path, sha256: str | None = None) -> None:
        self.path, self._sha256 = path, sha256
        self._file = MappedFile(path)
        self._entries, self.texts = read_header(self._file)

    @property
    def names(self) -> Collection[str]:
        """Names of the tensors, in the order of the file."""
        return self._entries.keys()

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of a tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Returns the type of a tensor's entries."""
        return self._entries[name].dtype

    def read(self, name: str) -> Tensor:
        """Returns a tensor."""
        entry = self._entries[name]
        return self._file.tensor(entry.dtype, entry.shape, entry.start)

    def slice(self, name: str, start: int, stop: int) -> Tensor:
        """Returns a part of a tensor; nothing else of it is read."""
        return self.read(name)[start:stop]

    def digest(self) -> str:
        """Returns the SHA-256 of the file."""
        if self._sha256 is None:
            with self.path.open("rb") as stream:
                self._sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        return self._sha256

    def close(self) -> None:
        """Closes the file."""
        self._entries = {}
        self._file.close()

    def __reduce__(self) -> tuple[type[SafetensorsStore], tuple[Path, str | None]]:
        return SafetensorsStore, (self.path.absolute(), self._sha256)


@final
class SafetensorsForm(AbstractForm):
    """A safetensors file with the texts of its header.

    Args:
        texts: What the header says beside the table of tensors.
    """

    name = "safetensors"

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = {key: text for key, text in texts.items() if key != _KEY}

    def suits(self, path: Path) -> bool:
        """Returns whether the name is one of a safetensors file."""
        return path.suffix == SUFFIX

    def has_room(self, path: Path) -> bool:
        """Returns whether the header says how the weights were made: a state dict of torch has none."""
        return self.suits(path)

    def write(self, path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Writes a safetensors file, or where the name is another one, a state dict as torch saves it."""
        if not self.suits(path):
            with torch_stream(path) as stream:
                torch.save(dict(state), stream)
            return
        with SafetensorsWriter(path, metadata, self._texts) as writer:
            for name, tensor in state.items():
                writer.write(name, tensor)


@final
class SafetensorsWriter(AbstractFileWriter):
    """Writes a state and plain metadata as a safetensors file.

    Args:
        path: The file.
        metadata: Plain data: what the file says about the state.
        texts: What else its header says.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any], texts: Mapping[str, str] | None = None) -> None:
        super().__init__(path, metadata)
        self._texts = {"format": "pt"} if texts is None else dict(texts)

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Writes the file.

        Raises:
            CheckpointError: A tensor has a type or layout that the format does not hold, or writing failed.
        """
        separate = _separate(state)
        plain = {key: value for key, value in self.metadata.items() if key != "template"}
        try:
            save_file(separate, self.path, metadata={**self._texts, _KEY: json.dumps(plain)})
        except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
            failed = _SYSTEM_ERROR.search(str(error))
            if failed is not None:
                number = int(failed[1])
                raise OSError(number, os.strerror(number), str(self.path)) from error
            raise CheckpointError(
                f"Cannot write '{self.path}' as safetensors ({error}). Give an output with .pt."
            ) from error
        _order_metadata(self.path)

    def reopened(self) -> SafetensorsStore:
        """Returns a store of the file."""
        return SafetensorsStore(self.path)


def _separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors of which no two share memory, as the format wants it: those that do are copied, and no other."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in state.items():
        ordered = tensor.contiguous()
        storage = ordered.untyped_storage()
        is_alone = storage.nbytes() == ordered.nbytes and storage.data_ptr() not in seen
        separate[name] = ordered if is_alone else ordered.clone()
        seen.add(storage.data_ptr())
    return separate


def _order_metadata(path: Path) -> None:
    """Puts the texts of the header in order: the library writes them in another one each time."""
    with path.open("r+b") as stream:
        size = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            stream.seek(_LENGTH_BYTES)
            stream.write(text.ljust(size))


def load(path: Path) -> Checkpoint:
    """Opens a safetensors file; no tensor is read.

    Raises:
        CheckpointError: The file is truncated or damaged, holds no tensor, or is of a newer version.
    """
    store = SafetensorsStore(path)
    if not store:
        raise CheckpointError(f"'{path}' is a safetensors file without tensors. Name one that holds a state dict.")
    kept = _metadata(path, store.texts)
    carried = carried_by(path, kept)
    written = ", written by mergekit_ot" if kept else ""
    named = f", architecture '{carried['architecture']}'" if carried["architecture"] else ""
    # A file of mergeot's own has no form but its name.
    form = None if kept else SafetensorsForm(store.texts)
    found = f"safetensors file with {len(store)} tensors{written}{named}"
    return Checkpoint(path, store, found=found, form=form, **carried)


def _metadata(path: Path, texts: Mapping[str, str]) -> dict[str, Any]:
    try:
        kept = json.loads(texts.get(_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        said = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise CheckpointError(
            f"Key '{_KEY}' in the header of '{path}' is damaged ({said}). Write the file again."
        ) from error
    if not isinstance(kept, dict):
        raise CheckpointError(
            f"Key '{_KEY}' in the header of '{path}' is damaged: it is no mapping. Write the file again."
        )
    return kept
