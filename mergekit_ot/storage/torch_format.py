"""Files that torch.save writes, new and legacy: stores of their tensors, and a writer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, final

import torch
from torch import Tensor

from mergekit_ot.errors import CheckpointError
from mergekit_ot.storage.file_writer import AbstractFileWriter
from mergekit_ot.storage.files import file_digest
from mergekit_ot.storage.limits import check_tensor_name, shortened
from mergekit_ot.storage.pickled_tensors import Unusable, unusable_in
from mergekit_ot.storage.record import FORMAT, Checkpoint, carried_by
from mergekit_ot.storage.state_dicts import find_state
from mergekit_ot.storage.store import AbstractHeldStore, TensorStore
from mergekit_ot.storage.torch_content import content_of
from mergekit_ot.storage.torch_stream import torch_stream


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
    return _from_content(path, content_of(path))


def _from_content(path: Path, content: object) -> Checkpoint:
    if isinstance(content, Mapping) and content.get("format") == FORMAT:
        return _own_format(path, content)
    held = find_state(content)
    if held is None:
        kind = "tensor without a name" if isinstance(content, Tensor) else type(content).__name__
        keys = ""
        if isinstance(content, Mapping):
            keys = f" with the keys {', '.join(shortened(key) for key in list(content)[:8])}"
        raise CheckpointError(
            f"'{path}' holds no state dict: it is a {kind}{keys}, and no mapping in it holds tensors by name. "
            "Save the weights with torch.save(model.state_dict(), path)."
        )
    if held.unusable is not None:
        _refuse_tensor(path, *held.unusable)
    for name in held.state:
        check_tensor_name(name, f"'{path}'")
    return Checkpoint(path, TorchStore(path, held.state), found=held.sentence)


def _refuse_tensor(path: Path, name: str, unusable: Unusable) -> NoReturn:
    raise CheckpointError(
        f"'{shortened(name)}' in '{path}' is {unusable.kind}, which cannot be fused. {unusable.advice}"
    )


def _own_format(path: Path, content: Mapping[str, Any]) -> Checkpoint:
    carried = carried_by(path, content)
    state = content.get("state_dict")
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(
            f"'{path}' was written by mergekit_ot, but its key 'state_dict' holds no tensor. Write it again."
        )
    for name, value in state.items():
        check_tensor_name(name, f"'{path}'")
        unusable = unusable_in(value)
        if unusable is not None:
            _refuse_tensor(path, name, unusable)
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"Key 'state_dict.{shortened(name)}' in '{path}' is a {type(value).__name__}, not a tensor. "
                "Write it again."
            )
    named = f", architecture '{carried['architecture']}'" if carried["architecture"] else ""
    found = f"state dict with {len(state)} tensors, written by mergekit_ot{named}"
    return Checkpoint(path, TorchStore(path, state), found=found, **carried)
