"""Checkpoints: read any plain state dict safely, write one that says how it was made.

A file written here holds plain data only: tensors, numbers, strings, lists and mappings. What it names (a registered
architecture) is looked up among the installed plugins; no code is ever taken out of a file.
"""

from __future__ import annotations

import argparse
import contextlib
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mergekit_ot.errors import CheckpointError
from mergekit_ot.files import check_readable, file_digest, replacing
from mergekit_ot.state_dicts import find_state, foreign_globals, quantised_name

if TYPE_CHECKING:
    from mergekit_ot.plugin_manager import PluginManager

FORMAT = "mergekit_ot"
VERSION = 1
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


@dataclass(frozen=True)
class Checkpoint:
    """A state dict and what its file says about it.

    Attributes:
        path: The file.
        state: Name → tensor, on the CPU; large files are mapped into memory and read when needed.
        architecture: Name of the registered architecture, where the file carries one.
        arguments: Keyword arguments of that architecture.
        input_shape: Shape of one input without the batch axis.
        found: A sentence: what was found in the file.
        sha256: Digest of the file.
        provenance: How the file was made, where it says so.
        build: Builds the module, where the file holds the program itself.
        example_inputs: Inputs of that program.

    Example:
        What a reader of a format returns (hook ``mergeot_load_checkpoint``):

        >>> checkpoint = Checkpoint(Path("net.npw"), {"weight": torch.zeros(2, 3)}, found="one array")
        >>> checkpoint.architecture is None
        True
    """

    path: Path
    state: Mapping[str, Tensor]
    architecture: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    input_shape: tuple[int, ...] | None = None
    found: str = ""
    sha256: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    build: Callable[[], nn.Module] | None = None
    example_inputs: tuple[Tensor, ...] | None = None


def load_checkpoint(path: str | Path, manager: PluginManager | None = None) -> Checkpoint:
    """Reads a checkpoint without executing anything that stands in it.

    Plugins are asked first (hook ``mergeot_load_checkpoint``); the core reads what ``torch.save`` writes, new and
    legacy, bare or inside the wrappers of training scripts.

    Raises:
        CheckpointError: The file is missing, truncated, carries code, is quantised, or holds no tensor.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "net.pt"
        >>> torch.save({"epoch": 3, "model_state_dict": {"module.weight": torch.zeros(2, 3)}}, path)
        >>> checkpoint = load_checkpoint(path)
        >>> list(checkpoint.state), "model_state_dict" in checkpoint.found
        (['weight'], True)
    """
    from mergekit_ot.plugin_manager import default_manager

    path = Path(path)
    check_readable(path)
    manager = manager or default_manager()
    checkpoint = manager.hook.mergeot_load_checkpoint(path=path)
    if checkpoint is None:
        checkpoint = _from_content(path, _read(path))
    damaged = quantised_name(checkpoint.state)
    if damaged is not None:
        raise CheckpointError(
            f"'{path}' holds quantised weights ('{damaged}'): packed integers cannot be averaged. "
            "Dequantise it to float32 with the tool that made it, or use the original checkpoint."
        )
    return checkpoint if checkpoint.sha256 else replace(checkpoint, sha256=file_digest(path))


def save_checkpoint(
    model_or_state: nn.Module | Mapping[str, Tensor],
    path: str | Path,
    *,
    architecture: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    input_shape: Sequence[int] | None = None,
    provenance: Mapping[str, Any] | None = None,
    template: str | Path | None = None,
    manager: PluginManager | None = None,
) -> Path:
    """Writes a checkpoint that carries its architecture by name, beside the place first, then renamed into it.

    Args:
        model_or_state: The module, or its state dict.
        path: Where to; plugins are asked first (hook ``mergeot_save_checkpoint``), then it is a PyTorch file.
        architecture: Name of a registered architecture, so that the file needs no ``--arch`` later.
        arguments: Its keyword arguments, plain data.
        input_shape: Shape of one input without the batch axis.
        provenance: Plain data on how the weights were made.
        template: A file that holds the program to which the state belongs, for formats that need one.
        manager: Whose formats are used; the installed plugins by default.

    Returns:
        The path.

    Raises:
        CheckpointError: The folder does not exist or cannot be written, or the metadata is not plain data.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "net.pt"
        >>> saved = save_checkpoint(nn.Linear(3, 2), path, architecture="linear", input_shape=(3,))
        >>> load_checkpoint(saved).architecture
        'linear'
    """
    from mergekit_ot.plugin_manager import default_manager

    path = Path(path)
    raw = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    state = {name: _compact(value) for name, value in raw.items() if isinstance(value, Tensor)}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": architecture,
        "arguments": dict(arguments or {}),
        "input_shape": None if input_shape is None else [int(size) for size in input_shape],
        "provenance": dict(provenance or {}),
    }
    for key, value in metadata.items():
        _check_plain(value, key)
    manager = manager or default_manager()
    with replacing(path) as beside:
        known = {**metadata, "template": None if template is None else str(template)}
        if not manager.hook.mergeot_save_checkpoint(path=beside, state=state, metadata=known):
            # Given a path, torch writes its name into the file, which would then differ from run to run.
            with beside.open("wb") as stream:
                torch.save({**metadata, "state_dict": state}, stream)
    return path


def check_finite(state: Mapping[str, Tensor], name: str) -> None:
    """Checks that no weight is NaN or infinite; integer tensors have no such value.

    Raises:
        CheckpointError: Names the first tensor that is not finite, and how many of its entries.
    """
    for key, value in state.items():
        if not (value.is_floating_point() or value.is_complex()):
            continue
        # Narrow float types have no test of their own.
        wide = value.float() if value.is_floating_point() and value.element_size() < 2 else value
        bad = int((~torch.isfinite(wide)).sum())
        if bad:
            raise CheckpointError(
                f"Tensor '{key}' of '{name}' has {bad} of {value.numel()} entries that are NaN or infinite: its "
                "training diverged, or the file is damaged. Use an earlier checkpoint of that training."
            )


def _read(path: Path) -> object:
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic in _OTHER_FORMATS:
        raise CheckpointError(f"'{path}' cannot be fused. {_OTHER_FORMATS[magic]}")
    if not magic:
        raise CheckpointError(f"'{path}' is empty: it was truncated while it was written or copied. Copy it again.")
    is_archive = magic == _ZIP_MAGIC
    if is_archive and not zipfile.is_zipfile(path):
        raise CheckpointError(f"'{path}' is truncated: the end of the archive is missing. Copy or download it again.")
    try:
        with _plain_data_allowed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:
        raise CheckpointError(_diagnosis(path, error)) from error


def _plain_data_allowed() -> contextlib.AbstractContextManager[object]:
    """Lets settings and measured numbers that training scripts store beside the weights load as plain data."""
    kinds = [np.dtypes.BoolDType, *(type(np.dtype(kind)) for kind in ("i4", "i8", "f2", "f4", "f8", "U1"))]
    functions = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(1).__reduce__()[0]}
    # NumPy moved its core: files name a function by the place where it was when they were written.
    moved = [(f, f"numpy.{core}.multiarray.{name}") for name, f in functions.items() for core in ("core", "_core")]
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
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, EOFError) or "unexpected EOF" in lines[0] or "truncated" in str(error):
        return f"'{path}' is truncated: the file ends before its tensors do. Copy or download it again."
    return (
        f"'{path}' is not a PyTorch checkpoint, or it is damaged ({lines[-1] if len(lines) > 1 else lines[0]}). "
        "Expected a file written by torch.save(model.state_dict(), path)."
    )


def _from_content(path: Path, content: object) -> Checkpoint:
    if isinstance(content, Mapping) and content.get("format") == FORMAT:
        return _own_format(path, content)
    found = find_state(content)
    if found is None:
        kind = type(content).__name__
        keys = f" with the keys {', '.join(map(str, list(content)[:8]))}" if isinstance(content, Mapping) else ""
        raise CheckpointError(
            f"'{path}' holds no state dict: it is a {kind}{keys}, and no mapping in it holds tensors by name. "
            "Save the weights with torch.save(model.state_dict(), path)."
        )
    return Checkpoint(path, found.state, found=found.sentence)


def _own_format(path: Path, content: Mapping[str, Any]) -> Checkpoint:
    if content.get("version", VERSION) > VERSION:
        raise CheckpointError(f"'{path}' was written by a newer version of mergekit_ot. Update the package to read it.")
    state = dict(content.get("state_dict") or {})
    if not state:
        raise CheckpointError(f"'{path}' was written by mergekit_ot but holds no tensor. Write it again.")
    architecture, shape = content.get("architecture"), content.get("input_shape")
    carried = f", architecture '{architecture}'" if architecture else ""
    return Checkpoint(
        path,
        state,
        architecture=architecture,
        arguments=dict(content.get("arguments") or {}),
        input_shape=None if shape is None else tuple(shape),
        found=f"state dict with {len(state)} tensors, written by mergekit_ot{carried}",
        provenance=dict(content.get("provenance") or {}),
    )


def _compact(value: Tensor) -> Tensor:
    """Detaches a tensor; a view is copied, because torch.save writes the whole storage behind it."""
    value = value.detach().cpu()
    return value.clone() if value.untyped_storage().nbytes() > value.numel() * value.element_size() else value


def _check_plain(value: object, where: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_plain(key, f"{where} key")
            _check_plain(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_plain(inner, where)
    elif value is not None and not isinstance(value, str | int | float | bool):
        raise CheckpointError(
            f"Cannot save '{where}': a {type(value).__name__} is not plain data. "
            "Use numbers, strings, booleans, None, lists and mappings of these."
        )
