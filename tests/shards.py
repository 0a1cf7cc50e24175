"""A third party's format, and the plugin of it: a folder of shards with an index, read and written by the tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_ot import Checkpoint, StoreWriter, TensorStore, hookimpl

INDEX = "index.json"


class ShardStore(TensorStore):
    """The tensors of all shards in a folder; `reads` notes what was read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        shards = {
            file: torch.load(folder / file, weights_only=True, mmap=True) for file in dict.fromkeys(index.values())
        }
        self._state = {name: shards[file][name] for name, file in index.items()}
        self.reads: list[str] = []

    @property
    def names(self) -> Collection[str]:
        return self._state.keys()

    def shape(self, name: str) -> torch.Size:
        return self._state[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._state[name].dtype

    def read(self, name: str) -> Tensor:
        self.reads.append(name)
        return self._state[name]

    def slice(self, name: str, start: int, stop: int) -> Tensor:
        return self._state[name][start:stop]

    def digest(self) -> str:
        digest = hashlib.sha256()
        for file in sorted(self.folder.iterdir()):
            digest.update(file.read_bytes())
        return digest.hexdigest()

    def close(self) -> None:
        self._state = {}

    def __reduce__(self) -> tuple[type[ShardStore], tuple[Path]]:
        return ShardStore, (self.folder.absolute(),)


class ShardWriter(StoreWriter):
    """Writes a shard as soon as it holds `size` tensors; the index is written last."""

    def __init__(self, folder: Path, size: int = 2) -> None:
        self.folder, self.size = folder, size
        self.folder.mkdir(parents=True, exist_ok=True)
        self.index: dict[str, str] = {}
        self.shard: dict[str, Tensor] = {}
        self.most_held = 0

    def write(self, name: str, tensor: Tensor) -> None:
        self.shard[name] = tensor.detach().clone()
        self.most_held = max(self.most_held, len(self.shard))
        if len(self.shard) == self.size:
            self._flush()

    def close(self) -> None:
        self._flush()
        (self.folder / INDEX).write_text(json.dumps(self.index), encoding="utf-8")

    def reopened(self) -> ShardStore:
        return ShardStore(self.folder)

    def _flush(self) -> None:
        if self.shard:
            file = f"shard-{len(self.index)}.pt"
            torch.save(self.shard, self.folder / file)
            self.index.update(dict.fromkeys(self.shard, file))
            self.shard = {}


def write_shards(state: Mapping[str, Tensor], folder: Path, size: int = 2) -> ShardStore:
    """Writes a state as shards of `size` tensors."""
    with ShardWriter(folder, size) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor)
    return writer.reopened()


@hookimpl
def mergeot_load_checkpoint(path: Path) -> Checkpoint | None:
    if not (path / INDEX).is_file():
        return None
    store = ShardStore(path)
    return Checkpoint(path, store, found=f"{len(store)} tensors in shards")


@hookimpl
def mergeot_save_checkpoint(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bool | None:
    if path.suffix != ".shards":
        return None
    write_shards(state, path)
    return True
