"""What stands inside a checkpoint file: the globals that a pickle names, and the state dict inside its wrappers."""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mergekit_ot.storage.store import TensorStore

# Keys under which training scripts keep a state dict, the likeliest first.
_WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "params",
    "parameters",
    "model_ema",
    "ema_state_dict",
    "ema",
)
_PREFIXES = ("module.", "_orig_mod.")
# State that belongs to the training and not to the model.
_TRAINING = ("optim", "scheduler", "scaler", "amp", "rng")
# Globals that a pickle of plain tensors and numbers may name.
_PLAIN_GLOBALS = re.compile(
    r"torch\.(\w+$|_utils\.|_tensor\.|storage\.|serialization\.|nn\.parameter\.)|collections\.OrderedDict$|_codecs\.encode$"
    r"|argparse\.Namespace$|numpy\.(dtype$|ndarray$|dtypes\.|_?core\.multiarray\.(scalar|_reconstruct)$)"
)
_MAX_DEPTH = 6
_QUANTISED = frozenset({torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4})


@dataclass(frozen=True)
class FoundState:
    """A state dict and the sentence that says where it stood."""

    state: dict[str, Tensor]
    sentence: str


def foreign_globals(path: Path) -> tuple[str, ...]:
    """Returns the names that the pickle in a file wants imported beyond plain tensors; nothing is executed."""
    named: dict[str, None] = {}
    for pickled in _pickles(path):
        named.update(dict.fromkeys(_globals_of(pickled)))
    return tuple(name for name in named if not _PLAIN_GLOBALS.match(name))


def _globals_of(pickled: bytes) -> list[str]:
    """Returns what a pickle wants imported, as far as it can be read."""
    named: list[str] = []
    strings: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name == "GLOBAL":
                named.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
                named.append(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    except Exception:  # whatever a damaged pickle raises
        return named
    return named


def _pickles(path: Path) -> list[bytes]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    content = path.read_bytes()
    # The legacy format is several pickles one after the other; each ends with the STOP opcode ".".
    pickles, start = [], 0
    for _ in range(4):
        stop = _stop_of(content[start:])
        if stop is None:
            pickles.append(content[start:])
            break
        pickles.append(content[start : start + stop])
        start += stop
    return pickles


def _stop_of(content: bytes) -> int | None:
    """Returns how long the pickle is with which `content` begins, or None where it does not end."""
    try:
        for opcode, _, position in pickletools.genops(content):
            if opcode.name == "STOP":
                return (position or 0) + 1
    except Exception:  # whatever a damaged pickle raises
        return None
    return None


def find_state(content: object) -> FoundState | None:
    """Finds the state dict in what a checkpoint file holds, or returns None where there is no tensor.

    A mapping under a name that training scripts use comes first, then the one with the most tensors; what belongs
    to an optimizer is never taken. A prefix that all names carry (``module.`` of data-parallel training,
    ``_orig_mod.`` of compiled modules) is removed.
    """
    candidates = _candidates(content, (), 0)
    if not candidates:
        return None
    path, state = min(candidates, key=lambda candidate: _rank(*candidate))
    tensors, prefix = _without_prefixes({key: value for key, value in state.items() if isinstance(value, Tensor)})
    beside = [key for key in _keys(content) if key != path[0]] if path else []
    rivals = [".".join(other) for other, _ in candidates if other and other != path]
    return FoundState(tensors, _sentence(len(tensors), path, prefix, beside, rivals))


def _sentence(count: int, path: tuple[str, ...], prefix: str, beside: list[str], rivals: list[str]) -> str:
    """Returns what was found: how many tensors, where, under which prefix, beside what, and what was not taken."""
    where = f"under '{'.'.join(path)}'" if path else "at the top level"
    sentence = f"state dict with {count} tensors {where}"
    if prefix:
        sentence += f", prefix '{prefix}' removed from every name"
    if beside:
        sentence += f"; beside it: {', '.join(beside[:6])}{' …' if len(beside) > 6 else ''}"
    if rivals and len(rivals) <= 6:
        sentence += f"; not taken: {', '.join(rivals)}"
    return sentence


def _keys(content: object) -> list[str]:
    return [str(key) for key in content] if isinstance(content, Mapping) else []


def _candidates(content: object, path: tuple[str, ...], depth: int) -> list[tuple[tuple[str, ...], Mapping]]:
    if not isinstance(content, Mapping) or depth > _MAX_DEPTH:
        return []
    candidates = []
    if _holds_tensors(content):
        candidates.append((path, content))
    for key, value in content.items():
        if isinstance(value, Mapping) and not str(key).lower().startswith(_TRAINING):
            candidates += _candidates(value, (*path, str(key)), depth + 1)
    return candidates


def _holds_tensors(content: Mapping) -> bool:
    return any(isinstance(value, Tensor) for value in content.values()) and all(isinstance(key, str) for key in content)


def _rank(path: tuple[str, ...], state: Mapping) -> tuple[bool, int, int, int]:
    # Single numbers beside a model (a loss, a learning rate) do not make a state dict.
    tensors = sum(isinstance(value, Tensor) and value.dim() > 0 for value in state.values())
    names = [_WRAPPERS.index(key.lower()) for key in path if key.lower() in _WRAPPERS]
    is_known = bool(names) or not path
    return (not is_known, -tensors, names[-1] if names else len(_WRAPPERS), len(path))


def _without_prefixes(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    removed = ""
    while state and (prefix := next((p for p in _PREFIXES if _is_shared(p, state)), None)):
        state = {name[len(prefix) :]: value for name, value in state.items()}
        removed += prefix
    return state, removed


def _is_shared(prefix: str, names: Iterable[str]) -> bool:
    return all(name.startswith(prefix) for name in names)


def quantised_name(store: TensorStore) -> str | None:
    """Returns the first name that shows packed or quantised weights, which no alignment can average, or None."""
    for name in store.names:
        is_packed = name.endswith((".qweight", ".qzeros", ".absmax", ".SCB", "._packed_params", ".quant_map"))
        if is_packed or ".quant_state." in name or store.dtype(name) in _QUANTISED:
            return name
    return None
