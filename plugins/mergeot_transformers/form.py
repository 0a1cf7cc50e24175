"""Writes a state as the folder that it belongs to: its files, its names, its configuration, and a model card."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from safetensors.torch import save_file
from torch import Tensor

from mergekit_ot import AbstractForm
from mergekit_ot.errors import CheckpointError
from mergeot_transformers.card import CARD, model_card
from mergeot_transformers.json_files import json_bytes, read_json
from mergeot_transformers.weights import INDEX, ShardedStore

if TYPE_CHECKING:
    from mergeot_transformers.names import DiskNames

_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|pt2|ckpt|h5|msgpack|gguf|onnx|onnx_data|npz|npy|tflite|ot|mlmodel|index\.json)", re.I
)
_CODE = re.compile(r".*\.(py|pyc|so|dll|sh|ipynb)", re.I)
# What a training leaves behind, what is written anew, and what says where a copy came from.
_LEFT = re.compile(
    r"(readme\.md|\..*|trainer_state\.json|mergeot\.json|events\.out\..*|.*\.log|all_results\.json)", re.I
)
_MODULES = "modules.json"
_PATHS = ("_name_or_path", "name_or_path")
_NOT_COPIED = ("auto_map",)
_TIED = "tie_word_embeddings"
_TYPES = ("dtype", "torch_dtype")
_LOADER = "model.safetensors"


@final
class FolderForm(AbstractForm):
    """A folder of the library: written with the files, names and configuration of the one that was read.

    Args:
        folder: The folder that was read.
        store: Its weights as they stand on the disk.
        names: What they are in the module; None where the state has the names of the disk.
    """

    name = "transformers"
    is_folder = True

    def __init__(self, folder: Path, store: ShardedStore, names: DiskNames | None) -> None:
        self.folder, self.store, self.names = folder, store, names

    def check(self) -> None:
        """Checks that what belongs to the folder can be copied.

        Raises:
            CheckpointError: Something is a link to a file outside of it.
        """
        for _ in belonging(self.folder):
            pass

    def write(self, path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Writes weights, configuration, the files that belong to them, and a model card.

        Raises:
            CheckpointError: The state does not fit the folder, or a file cannot be copied.
        """
        path.mkdir(exist_ok=True)
        written = dict(state) if self.names is None else self.names.on_disk(state)
        self._write_weights(path, written)
        # What was tied and no longer is has a name of its own, which the library would tie again.
        is_untied = self.names is not None and bool(self.names.apart(state))
        for file in belonging(self.folder):
            target = path / file
            target.parent.mkdir(exist_ok=True)
            _copy(self.folder / file, target)
        self._adapt_configuration(path / "config.json", state, is_untied)
        (path / CARD).write_text(model_card(self.folder, metadata), encoding="utf-8")

    def _adapt_configuration(self, file: Path, state: Mapping[str, Tensor], is_untied: bool) -> None:
        """Makes a configuration say what is written: what is no longer tied, and another type of numbers."""
        content = found = read_json(file)
        if is_untied:
            content = {**_with(content, {_TIED: False}), _TIED: False}
        kinds = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
        held = {self.store.dtype(name) for name in self.store.names}
        if len(kinds) == 1 and not kinds & held:
            (kind,) = kinds
            content = _with(content, dict.fromkeys(_TYPES, str(kind).removeprefix("torch.")))
        if content != found:
            file.write_bytes(json_bytes(content))

    def _write_weights(self, path: Path, state: Mapping[str, Tensor]) -> None:
        """Writes every tensor into the file in which it stood; new ones go into the last."""
        files = {file: _as_safetensors(file) for file in self.store.weights.files}
        shards: dict[str, dict[str, Tensor]] = {file: {} for file in files.values()}
        held = self.store.names
        last = next(reversed(shards))
        for name, tensor in state.items():
            file = files[self.store.file_of(name)] if name in held else last
            shards[file][name] = tensor
        filled = {file: tensors for file, tensors in shards.items() if tensors}
        for file, tensors in filled.items():
            save_file(_apart(tensors), path / file, metadata={"format": "pt"})
        if list(filled) != [_LOADER]:
            places = {name: file for file, tensors in filled.items() for name in tensors}
            size = sum(tensor.nbytes for tensor in state.values())
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
            (path / f"{_LOADER}{INDEX}").write_bytes(json_bytes(index))


def _with(content: Any, values: Mapping[str, Any]) -> Any:
    """Returns a configuration in which keys that it has, on any level, have other values."""
    if not isinstance(content, dict):
        return content
    return {key: values.get(key, _with(value, values)) for key, value in content.items()}


def _as_safetensors(file: str) -> str:
    """Returns the name of a file of weights with the extension in which they are written."""
    if file.endswith(".safetensors"):
        return file
    return re.sub(r"^pytorch_model", "model", file.removesuffix(".bin")) + ".safetensors"


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors that lie densely and of which no two share memory, as the format wants it."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        dense = tensor.contiguous()
        storage = dense.untyped_storage()
        is_alone = storage.nbytes() == dense.nbytes and storage.data_ptr() not in seen
        apart[name] = dense if is_alone else dense.clone()
        seen.add(storage.data_ptr())
    return apart


def belonging(folder: Path) -> Iterator[str]:
    """Yields the files of a folder that belong to its weights: configuration, tokenizer, processor, licence.

    No weights, no code, no left-overs of a training. Of folders in it, those that ``modules.json`` names are taken.
    """
    for file in sorted(folder.iterdir()):
        if file.is_file() and not any(kind.fullmatch(file.name) for kind in (_WEIGHTS, _CODE, _LEFT)):
            _check_inside(folder, file)
            yield file.name
    for name in kept_folders(folder):
        for file in sorted((folder / name).iterdir()):
            if file.is_file() and not _CODE.fullmatch(file.name):
                _check_inside(folder, file)
                yield f"{name}/{file.name}"


def kept_folders(folder: Path) -> list[str]:
    """Returns the folders that hold further modules of a sentence transformer, as they are named beside them."""
    if not (folder / _MODULES).is_file():
        return []
    try:
        content = json.loads((folder / _MODULES).read_text(encoding="utf-8")[: 1 << 20])
        names = [str(module["path"]) for module in content if module["path"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    plain = [name for name in names if Path(name).name == name and name != ".."]
    return [name for name in plain if (folder / name).is_dir() and not (folder / name).is_symlink()]


def _check_inside(folder: Path, file: Path) -> None:
    """Checks that a file is no link to somewhere else, such as to what its maker does not own.

    Raises:
        CheckpointError: It is one.
    """
    place, root = file.resolve(), folder.resolve()
    # The cache of the hub keeps files beside the folders in which they are linked.
    is_cached = root.parent.name == "snapshots" and place.is_relative_to(root.parent.parent / "blobs")
    if not (place.is_relative_to(root) or is_cached):
        raise CheckpointError(
            f"'{file}' is a link to a file outside of its folder, which is not copied into the output. Replace it by "
            "the file itself, or remove it."
        )


def _copy(source: Path, target: Path) -> None:
    """Copies a file; what a configuration says of the place where it once stood, or of code beside it, is left out."""
    if source.name in ("config.json", "tokenizer_config.json") and source.parent.is_dir():
        content = read_json(source)
        left = {key for key in _PATHS if Path(str(content.get(key, ""))).is_absolute()}
        if left or any(key in content for key in _NOT_COPIED):
            kept = {key: value for key, value in content.items() if key not in (*left, *_NOT_COPIED)}
            target.write_bytes(json_bytes(kept))
            return
    shutil.copyfile(source, target)
