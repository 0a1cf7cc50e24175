"""What stands inside a checkpoint file: the state dict inside its wrappers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ot.storage.limits import shortened
from mergekit_ot.storage.pickled_tensors import Unusable, is_tensor, unusable_in
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
_MAX_DEPTH = 6
_QUANTISED = frozenset({torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4})


@dataclass(frozen=True)
class FoundState:
    """A state dict and the sentence that says where it stood.

    Attributes:
        state: Name → tensor.
        sentence: Where it stood, and what stood beside it.
        unusable: The first name whose tensor is sparse, quantised or the like, with what it is; None where all are
            plain.
    """

    state: dict[str, Tensor]
    sentence: str
    unusable: tuple[str, Unusable] | None = None


def find_state(content: object) -> FoundState | None:
    """Finds the state dict in what a checkpoint file holds, or returns None where there is no tensor.

    A mapping under a name that training scripts use comes first, then the one with the most tensors; what belongs
    to an optimizer is never taken. A prefix that all names carry (``module.`` of data-parallel training,
    ``_orig_mod.`` of compiled modules) is removed.
    """
    candidates = _candidates(content, (), set())
    if not candidates:
        return None
    path, state = min(candidates, key=lambda candidate: _rank(*candidate))
    tensors, prefix = _without_prefixes({key: value for key, value in state.items() if isinstance(value, Tensor)})
    beside = [key for key in _keys(content) if key != path[0]] if path else []
    rivals = [".".join(other) for other, _ in candidates if other and other != path]
    unusable = next(((name, kind) for name, value in state.items() if (kind := unusable_in(value))), None)
    return FoundState(tensors, _sentence(len(tensors), path, prefix, beside, rivals), unusable)


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
    return [shortened(key) for key in content] if isinstance(content, Mapping) else []


def _candidates(content: object, path: tuple[str, ...], seen: set[int]) -> list[tuple[tuple[str, ...], Mapping]]:
    # A mapping may hold one many times, and itself.
    if not isinstance(content, Mapping) or len(path) > _MAX_DEPTH or id(content) in seen:
        return []
    seen.add(id(content))
    candidates = []
    if _holds_tensors(content):
        candidates.append((path, content))
    for key, value in content.items():
        if isinstance(value, Mapping) and not str(key).lower().startswith(_TRAINING):
            candidates += _candidates(value, (*path, shortened(key)), seen)
    return candidates


def _holds_tensors(content: Mapping) -> bool:
    return any(map(is_tensor, content.values())) and all(isinstance(key, str) for key in content)


def _rank(path: tuple[str, ...], state: Mapping) -> tuple[bool, int, int, int]:
    # Single numbers beside a model (a loss, a learning rate) do not make a state dict.
    tensors = sum(not isinstance(value, Tensor) or value.dim() > 0 for value in filter(is_tensor, state.values()))
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


def narrow_name(store: TensorStore) -> str | None:
    """Returns the first name whose numbers have less than 16 bits and a point, in which torch adds nothing, or None."""
    return next((name for name in store.names if _is_narrow(store.dtype(name))), None)


def _is_narrow(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize < torch.float16.itemsize
