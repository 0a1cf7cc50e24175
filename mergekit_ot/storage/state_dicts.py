"""What stands inside a checkpoint file: the globals that a pickle names, and the state dict inside its wrappers."""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

# Keys under which training scripts keep a state dict, the likeliest first.
_WRAPPERS = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params",
    "parameters", "model_ema", "ema_state_dict", "ema",
)  # fmt: skip
_PREFIXES = ("module.", "_orig_mod.")
# State that belongs to the training and not to the model.
_TRAINING = ("optim", "scheduler", "scaler", "amp", "rng")
# Globals that a pickle of plain tensors and numbers may name.
_PLAIN_GLOBALS = re.compile(
    r"torch\.(\w+$|_utils\.|_tensor\.|storage\.|serialization\.|nn\.parameter\.)|collections\.OrderedDict$|_codecs\.encode$"
    r"|argparse\.Namespace$|numpy\.(dtype$|ndarray$|dtypes\.|_?core\.multiarray\.(scalar|_reconstruct)$)"
)
_MAX_DEPTH = 6


@dataclass(frozen=True)
class FoundState:
    """A state dict and the sentence that says where it stood."""

    state: dict[str, Tensor]
    sentence: str


def foreign_globals(path: Path) -> tuple[str, ...]:
    """Returns the names that the pickle in a file wants imported beyond plain tensors; nothing is executed."""
    found: dict[str, None] = {}
    for pickled in _pickles(path):
        strings: list[str] = []
        try:
            for opcode, argument, _ in pickletools.genops(pickled):
                if opcode.name == "GLOBAL":
                    found[str(argument).replace(" ", ".")] = None
                elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
                    found[".".join(strings[-2:])] = None
                elif isinstance(argument, str):
                    strings.append(argument)
        except Exception:
            continue
    return tuple(name for name in found if not _PLAIN_GLOBALS.match(name))


def _pickles(path: Path) -> list[bytes]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    content = path.read_bytes()
    # The legacy format is several pickles one after the other; each ends with the STOP opcode ".".
    pieces, start = [], 0
    for _ in range(4):
        try:
            for opcode, _argument, position in pickletools.genops(content[start:]):
                if opcode.name == "STOP":
                    pieces.append(content[start : start + (position or 0) + 1])
                    start += (position or 0) + 1
                    break
        except Exception:
            pieces.append(content[start:])
            break
    return pieces


def find_state(content: object) -> FoundState | None:
    """Finds the state dict in what a checkpoint file holds, or returns None where there is no tensor.

    A mapping under a name that training scripts use comes first, then the one with the most tensors; what belongs
    to an optimizer is never taken. A prefix that all names carry (``module.`` of data-parallel training,
    ``_orig_mod.`` of compiled modules) is removed.
    """
    candidates = _candidates(content, (), 0)
    if not candidates:
        return None
    best = min(candidates, key=lambda found: _rank(*found))
    path, state = best
    names = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    names, removed = _without_prefixes(names)
    where = f"under '{'.'.join(path)}'" if path else "at the top level"
    beside = [key for key in _keys(content) if not path or key != path[0]] if path else []
    sentence = f"state dict with {len(names)} tensors {where}"
    if removed:
        sentence += f", prefix '{removed}' removed from every name"
    if beside:
        sentence += f"; beside it: {', '.join(beside[:6])}{' …' if len(beside) > 6 else ''}"
    rivals = [".".join(other) for other, _ in candidates if other and other != path]
    if rivals and len(rivals) <= 6:
        sentence += f"; not taken: {', '.join(rivals)}"
    return FoundState(names, sentence)


def _keys(content: object) -> list[str]:
    return [str(key) for key in content] if isinstance(content, Mapping) else []


def _candidates(content: object, path: tuple[str, ...], depth: int) -> list[tuple[tuple[str, ...], Mapping]]:
    if not isinstance(content, Mapping) or depth > _MAX_DEPTH:
        return []
    found = []
    if any(isinstance(value, Tensor) for value in content.values()) and all(isinstance(key, str) for key in content):
        found.append((path, content))
    for key, value in content.items():
        if isinstance(value, Mapping) and not str(key).lower().startswith(_TRAINING):
            found += _candidates(value, (*path, str(key)), depth + 1)
    return found


def _rank(path: tuple[str, ...], state: Mapping) -> tuple[bool, int, int, int]:
    # Single numbers beside a model (a loss, a learning rate) do not make a state dict.
    tensors = sum(isinstance(value, Tensor) and value.dim() > 0 for value in state.values())
    names = [_WRAPPERS.index(key.lower()) for key in path if key.lower() in _WRAPPERS]
    is_known = bool(names) or not path
    return (not is_known, -tensors, names[-1] if names else len(_WRAPPERS), len(path))


def _without_prefixes(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    removed = ""
    while prefix := next((p for p in _PREFIXES if state and all(name.startswith(p) for name in state)), None):
        state = {name[len(prefix) :]: value for name, value in state.items()}
        removed += prefix
    return state, removed


def quantised_name(state: Mapping[str, Tensor]) -> str | None:
    """Returns the first name that shows packed or quantised weights, which no alignment can average, or None."""
    for name, value in state.items():
        if value.is_quantized or name.endswith((".qweight", ".qzeros", ".absmax", ".SCB", "._packed_params")):
            return name
        if ".quant_state." in name or name.endswith(".quant_map"):
            return name
    return None
