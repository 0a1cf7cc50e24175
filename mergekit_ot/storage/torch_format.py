"""Files that torch.save writes, new and legacy: stores of their tensors, and a writer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, final

import torch
from torch import Tensor

from mergekit_ot.errors import CheckpointError
from mergekit_ot.storage.file_writer import AbstractFileWriter
from mergekit_ot.storage.files import file_digest
from mergekit_ot.storage.limits import check_tensor_name, shortened
from mergekit_ot.storage.pickled_tensors import Unusable, tensor_in, unusable_in
from mergekit_ot.storage.record import FORMAT, Checkpoint, carried_by
from mergekit_ot.storage.state_dicts import Candidate, find_candidates, found_in
from mergekit_ot.storage.store import AbstractHeldStore, TensorStore
from mergekit_ot.storage.torch_content import content_of, is_bare_pickle
from mergekit_ot.storage.torch_form import WrappedForm
from mergekit_ot.storage.torch_stream import torch_stream


@final
class TorchStore(AbstractHeldStore):
    """The state dict in a file of torch: mapped into memory and read when needed, or read whole (legacy files).

    Args:
        path: The file.
        state: What was found in it.
        sha256: The file's digest, where it was taken as the file was read.
        key: The keys that lead to the state in the file, where it is not the likeliest one.
    """

    def __init__(
        self, path: Path, state: Mapping[str, Tensor], sha256: str | None = None, key: str | None = None
    ) -> None:
        super().__init__(dict(state))
        self.path, self._sha256, self._key = path, sha256, key

    def digest(self) -> str:
        """Returns the SHA-256 of the file."""
        if self._sha256 is None:
            self._sha256 = file_digest(self.path)
        return self._sha256

    def __reduce__(self) -> tuple[Callable[..., TorchStore], tuple[Path, str | None, str | None]]:
        return _reopened, (self.path.absolute(), self._sha256, self._key)


def _reopened(path: Path, sha256: str | None, key: str | None) -> TorchStore:
    read = read_torch_file(path)
    checkpoint = read.alternatives[key]() if key is not None and key in read.alternatives else read
    return TorchStore(path, checkpoint.state, sha256, key)


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
    candidates = find_candidates(content)
    if not candidates:
        kind = "tensor without a name" if tensor_in(content) is not None else type(content).__name__
        keys = ""
        if isinstance(content, Mapping):
            keys = f" with the keys {', '.join(shortened(key) for key in list(content)[:8])}"
        raise CheckpointError(
            f"'{path}' holds no state dict: it is a {kind}{keys}, and no mapping in it holds tensors by name. "
            "Save the weights with torch.save(model.state_dict(), path)."
        )
    return _candidate(path, content, candidates[0], candidates)


def _candidate(path: Path, content: object, chosen: Candidate, candidates: Sequence[Candidate]) -> Checkpoint:
    held = found_in(content, chosen, candidates)
    if held.unusable is not None:
        _refuse_tensor(path, *held.unusable)
    for name in held.state:
        check_tensor_name(name, f"'{path}'")
    is_first = chosen is candidates[0]
    store = TorchStore(path, held.state, key=None if is_first else chosen.key)
    others = [other for other in candidates if other is not chosen]
    return Checkpoint(
        path,
        store,
        found=held.sentence,
        form=WrappedForm(content, chosen, candidates, held.prefix, is_pickle=is_bare_pickle(path)),
        key=chosen.key,
        alternatives={other.key: functools.partial(_candidate, path, content, other, candidates) for other in others},
    )


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
