"""Files of NumPy arrays (``.npz``) as checkpoints: read without unpickling, and written as they came."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from mergekit_ot.errors import CheckpointError
from mergekit_ot.storage.archives import Archive
from mergekit_ot.storage.arrays import ArrayArchive
from mergekit_ot.storage.forms import AbstractForm
from mergekit_ot.storage.limits import check_tensor_name, shortened
from mergekit_ot.storage.record import Checkpoint
from mergekit_ot.storage.regular import read_bounded
from mergekit_ot.storage.store import MemoryStore
from mergekit_ot.storage.torch_form import PlainForm

SUFFIX = ".npz"
_MAGIC = b"PK\x03\x04"
_ARRAY = ".npy"
_ADVICE = "Save the weights as arrays of numbers: numpy.savez('net.npz', **{name: tensor.numpy(), …})."
# The moment that every entry has, so that the same weights give the same file.
_MOMENT = (1980, 1, 1, 0, 0, 0)


@final
class ArraysForm(AbstractForm):
    """An archive of arrays by name, as ``numpy.savez`` writes it.

    Args:
        is_packed: Whether the arrays are compressed (``numpy.savez_compressed``).
    """

    name = "npz"

    def __init__(self, *, is_packed: bool = False) -> None:
        self._packing = zipfile.ZIP_DEFLATED if is_packed else zipfile.ZIP_STORED

    def write(self, path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Writes an archive of arrays, or where the name is one of torch, a state dict.

        Raises:
            CheckpointError: NumPy has no such numbers.
        """
        if not self.suits(path):
            PlainForm().write(path, state, metadata)
            return
        with zipfile.ZipFile(path, "w", self._packing) as archive:
            for name, tensor in state.items():
                entry = zipfile.ZipInfo(name + _ARRAY, _MOMENT)
                entry.compress_type = self._packing
                with archive.open(entry, "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, _array(name, tensor), allow_pickle=False)

    def has_room(self, path: Path) -> bool:
        """Returns False: there are only arrays."""
        return False

    def suits(self, path: Path) -> bool:
        """Returns whether the name is one of an archive of arrays."""
        return path.suffix == SUFFIX


def _array(name: str, tensor: Tensor) -> np.ndarray:
    try:
        return tensor.numpy()
    except (TypeError, RuntimeError) as failure:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"'{shortened(name)}' is of the type {kind}, which NumPy does not have. Give an output with .pt."
        ) from failure


def read_arrays(path: Path) -> Checkpoint | None:
    """Reads an archive of arrays; returns None where the file is none.

    Raises:
        CheckpointError: It is damaged, or holds objects, text or other things that are no numbers.
    """
    if read_bounded(path, len(_MAGIC)) != _MAGIC:
        return None
    with Archive(path) as archive:
        members = list(archive.members.values())
    if not members or not all(member.name.endswith(_ARRAY) for member in members):
        return None
    with ArrayArchive(path, CheckpointError, _ADVICE) as arrays:
        state = {}
        for name in arrays.names:
            check_tensor_name(name, f"'{path}'")
            state[name] = _tensor(path, name, arrays.read(name))
    form = ArraysForm(is_packed=any(member.is_packed for member in members))
    return Checkpoint(path, MemoryStore(state), found=f"archive of {len(state)} NumPy arrays", form=form)


def _tensor(path: Path, name: str, array: np.ndarray) -> Tensor:
    try:
        return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    except TypeError as failure:
        raise CheckpointError(
            f"'{shortened(name)}' in '{path}' holds numbers of the type {array.dtype}, which torch does not have. "
            f"{_ADVICE}"
        ) from failure
