"""The weights of a folder: tensors in one file or in several, each read when it is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from mergekit_ot import TensorStore, load_checkpoint
from mergekit_ot.errors import CheckpointError
from mergeot_transformers.json_files import read_json

# In the order in which the library looks for them.
SINGLE = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"
_MOST_FILES = 100_000


@final
@dataclass(frozen=True)
class WeightFiles:
    """Which files of a folder hold its weights.

    Attributes:
        folder: The folder.
        files: File names, in order.
        places: Tensor name → file name, as the index says it; empty where there is one file.
    """

    folder: Path
    files: tuple[str, ...]
    places: Mapping[str, str]


def find_weights(folder: Path) -> WeightFiles:
    """Returns the files that hold the weights of a folder.

    Raises:
        CheckpointError: There are none, one is missing, or the index is damaged or points out of the folder.
    """
    for name in SINGLE:
        if (folder / name).is_file():
            return WeightFiles(folder, (name,), {})
        if (folder / f"{name}{INDEX}").is_file():
            places = _places(folder / f"{name}{INDEX}")
            return WeightFiles(folder, tuple(sorted(set(places.values()))), places)
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    if "adapter_config.json" in names:
        raise CheckpointError(
            f"'{folder}' holds an adapter of PEFT and no whole model. Merge it into its base first "
            "(merge_and_unload, then save_pretrained), and name that folder."
        )
    raise CheckpointError(
        f"'{folder}' has a config.json but no weights: neither {' nor '.join(SINGLE)}, nor their index. It contains: "
        f"{', '.join(names[:8])}{more}. Download the weights, or name the folder that has them."
    )


def _places(index: Path) -> dict[str, str]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"'{index}' has no table 'weight_map' of names and files. Copy or download it again.")
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", "..") or "\\" in file:
            raise CheckpointError(
                f"'{index}' says that '{name[:80]}' stands in {str(file)[:80]!r}, which is no file name in its folder. "
                "Do not use this folder unless you know why."
            )
    files = set(places.values())
    if len(files) > _MOST_FILES:
        raise CheckpointError(f"'{index}' names {len(files)} files. Download it again.")
    missing = sorted(file for file in files if not (index.parent / file).is_file())
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"'{index.parent}' is not whole: {', '.join(missing[:3])}{more} of {len(files)} files are missing. "
            "Download it again."
        )
    return places


@final
class ShardedStore(TensorStore):
    """The tensors of several files under one roof; a file is opened for its table at once, its tensors when needed.

    Args:
        weights: The files.

    Raises:
        CheckpointError: A file is damaged, two hold one name, or the index names a tensor that is not there.
    """

    def __init__(self, weights: WeightFiles) -> None:
        self.weights = weights
        self._stores = {name: load_checkpoint(weights.folder / name).state for name in weights.files}
        self._holders: dict[str, TensorStore] = {}
        for file, store in self._stores.items():
            for name in store.names:
                if name in self._holders:
                    raise CheckpointError(
                        f"'{name[:80]}' stands in two files of '{weights.folder}', one of them {file}. "
                        "Remove what does not belong there, or download it again."
                    )
                self._holders[name] = store
        for name, file in weights.places.items():
            if name not in self._stores[file]:
                raise CheckpointError(
                    f"The index of '{weights.folder}' says that '{name[:80]}' stands in {file}, and it does not. "
                    "Download it again."
                )

    @property
    def names(self) -> Collection[str]:
        """Names of the tensors, file by file."""
        return self._holders.keys()

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of a tensor."""
        return self._holders[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Returns the type of a tensor's entries."""
        return self._holders[name].dtype(name)

    def read(self, name: str) -> Tensor:
        """Returns a tensor."""
        return self._holders[name].read(name)

    def slice(self, name: str, start: int, stop: int) -> Tensor:
        """Returns a part of a tensor; nothing else of it is read."""
        return self._holders[name].slice(name, start, stop)

    def digest(self) -> str:
        """Returns the SHA-256 of the file, or of the names and digests of all."""
        digests = self.digests()
        if len(digests) == 1:
            return next(iter(digests.values()))
        listing = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
        return hashlib.sha256(listing.encode()).hexdigest()

    def digests(self) -> dict[str, str]:
        """Returns file name → SHA-256."""
        return {name: store.digest() for name, store in self._stores.items()}

    def file_of(self, name: str) -> str:
        """Returns the name of the file that holds a tensor.

        Raises:
            KeyError: There is no such tensor.
        """
        holder = self._holders[name]
        return next(file for file, store in self._stores.items() if store is holder)

    def close(self) -> None:
        """Closes all files."""
        for store in self._stores.values():
            store.close()
        self._holders = {}

    def __reduce__(self) -> tuple[type[ShardedStore], tuple[WeightFiles]]:
        weights = self.weights
        return ShardedStore, (WeightFiles(weights.folder.absolute(), weights.files, dict(weights.places)),)
