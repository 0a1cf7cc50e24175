"""Reads a folder of the library: a configuration, weights in one file or several, and what belongs to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_ot import Checkpoint, TensorStore
from mergekit_ot.errors import CheckpointError
from mergeot_transformers.form import FolderForm, kept_folders
from mergeot_transformers.json_files import read_json
from mergeot_transformers.weights import ShardedStore, find_weights

CONFIG = "config.json"
_SHOWN = 3


def load_folder(path: Path) -> Checkpoint:
    """Opens a folder; no tensor is read, and no code of the folder is run.

    Where the network cannot be built, the tensors have the names that they have on the disk, and it is said why.

    Raises:
        CheckpointError: Something in the folder is damaged or missing, or the weights are quantised.
    """
    content = read_json(path / CONFIG)
    store = ShardedStore(find_weights(path))
    if not store:
        raise CheckpointError(f"The weights of '{path}' hold no tensor. Download the folder again.")
    count = len(store.weights.files)
    found = f"Hugging Face folder with {len(store)} tensors" + (f" in {count} files" if count > 1 else "")
    try:
        import transformers
    except ImportError:
        transformers = None
    if transformers is None:
        reason = "transformers is not installed, which knows what its config.json means: pip install 'mergekit-ot[hf]'"
        return _bare(path, store, f"{found}; {reason}")
    return _with_network(path, content, store, found)


def _bare(path: Path, store: ShardedStore, found: str) -> Checkpoint:
    return Checkpoint(path, store, found=found, form=FolderForm(path, store, None))


def _with_network(path: Path, content: Mapping[str, Any], store: ShardedStore, found: str) -> Checkpoint:
    from mergeot_transformers.configuration import UnknownNetworkError, known_network
    from mergeot_transformers.inputs import example_inputs, input_names
    from mergeot_transformers.names import DiskNames, ModuleStore
    from mergeot_transformers.networks import FolderNetwork, outline

    try:
        kind, values = known_network(content, len(store))
        model = outline(kind.__name__, values)
        names = input_names(model)
        inputs = example_inputs(model, names)
    except UnknownNetworkError as unknown:
        return _bare(path, store, f"{found}; {unknown}, so its network cannot be built from it")
    except CheckpointError as refused:
        raise CheckpointError(f"'{path}': {refused}") from refused
    except Exception as failure:
        said = next(iter(str(failure).splitlines()), "")[:200]
        reason = f"transformers refuses its config.json ({type(failure).__name__}: {said})"
        return _bare(path, store, f"{found}; {reason}, so its network cannot be built from it")
    disk = DiskNames(model, store)
    module = ModuleStore(store, disk, (reopened, (path.absolute(),)))
    shapes = ", ".join("×".join(map(str, (name, *value.shape[1:]))) for name, value in zip(names, inputs, strict=True))
    return Checkpoint(
        path,
        module,
        architecture=kind.__name__,
        found=f"{found}, {kind.__name__}, traced at {shapes}{_left_out(disk.unused, kind.__name__)}{_carried(path)}",
        build=FolderNetwork(kind.__name__, json.dumps(values, sort_keys=True), names),
        example_inputs=inputs,
        form=FolderForm(path, store, disk),
    )


def reopened(path: Path) -> TensorStore:
    """Returns the tensors of a folder, opened anew."""
    return load_folder(path).state


def _left_out(unused: list[str], kind: str) -> str:
    if not unused:
        return ""
    more = f" and {len(unused) - _SHOWN} more" if len(unused) > _SHOWN else ""
    names = ", ".join(f"'{name[:80]}'" for name in unused[:_SHOWN])
    return f"; {kind} has no use for {names}{more}: left out"


def _carried(path: Path) -> str:
    folders = kept_folders(path)
    return f"; taken along as they are: {', '.join(folders)}" if folders else ""
