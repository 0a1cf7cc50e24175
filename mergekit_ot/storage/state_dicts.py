"""What stands inside a checkpoint file: the state dict inside its wrappers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from mergekit_ot.storage.limits import shortened
from mergekit_ot.storage.pickled_arrays import HeldArray
from mergekit_ot.storage.pickled_tensors import Unusable, is_tensor, tensor_in, unusable_in
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
# Words in the keys of what belongs to the training and not to the model.
_TRAINING = frozenset({"scaler", "amp", "rng", "loops", "callbacks", "sampler", "dataloader"})
_TRAINING_STARTS = ("optim", "sched")
_NOT_SEARCHED = ("optim", "scheduler", "scaler", "amp", "rng")
_MAX_DEPTH = 6
_QUANTISED = frozenset({torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4})
# What the words in a name say that belongs to a copy of the weights which is an average over the training.
_AVERAGES = frozenset({"ema", "averaged", "shadow", "swa", "polyak"})


@dataclass(frozen=True)
class FoundState:
    """A state dict and the sentence that says where it stood.

    Attributes:
        state: Name → tensor.
        sentence: Where it stood, and what stood beside it.
        unusable: The first name whose tensor is sparse, quantised or the like, with what it is; None where all are
            plain.
        path: The keys that lead to it.
        prefix: What was taken off every name.
    """

    state: dict[str, Tensor]
    sentence: str
    unusable: tuple[str, Unusable] | None = None
    path: tuple[object, ...] = ()
    prefix: str = ""


@final
@dataclass(frozen=True)
class Candidate:
    """A mapping of tensors by name, or a list of them, that stands in a file.

    Attributes:
        path: The keys that lead to it.
        content: The mapping or the list.
    """

    path: tuple[object, ...]
    content: Mapping | Sequence

    @property
    def key(self) -> str:
        """The keys that lead to it as one text, by which the user names it; empty at the top level."""
        return ".".join(map(shortened, self.path))

    @property
    def values(self) -> Mapping[str, object]:
        """Name → what stands there; of a list the names are those that NumPy gives to arrays without names."""
        if isinstance(self.content, Mapping):
            return self.content
        return {f"arr_{place}": value for place, value in enumerate(self.content)}

    @property
    def is_usual(self) -> bool:
        """Whether it stands where training scripts keep a state dict."""
        return is_usual_key(self.key)


def find_state(content: object) -> FoundState | None:
    """Finds the state dict in what a checkpoint file holds, or returns None where there is no tensor.

    A mapping under a name that training scripts use comes first, then the one with the most tensors; what belongs
    to an optimizer is never taken. A prefix that all names carry (``module.`` of data-parallel training,
    ``_orig_mod.`` of compiled modules) is removed.
    """
    candidates = find_candidates(content)
    return found_in(content, candidates[0], candidates) if candidates else None


def find_candidates(content: object) -> list[Candidate]:
    """Returns all state dicts in what a checkpoint file holds, the likeliest first."""
    return sorted(_candidates(content, (), set()), key=_rank)


def found_in(content: object, chosen: Candidate, candidates: Iterable[Candidate]) -> FoundState:
    """Returns one of the state dicts that stand in what a checkpoint file holds.

    Args:
        content: What the file holds.
        chosen: Which of them.
        candidates: All of them.
    """
    named = {name: tensor_in(value) for name, value in chosen.values.items()}
    tensors, prefix = _without_prefixes({name: tensor for name, tensor in named.items() if tensor is not None})
    path = chosen.path
    beside = [key for key in _keys(content) if key != shortened(path[0])] if path else []
    rivals = [other.key for other in candidates if other.path and other.path != path]
    unusable = next(((name, kind) for name, value in chosen.values.items() if (kind := unusable_in(value))), None)
    sentence = _sentence(len(tensors), chosen, prefix, beside, rivals)
    return FoundState(tensors, sentence, unusable, path, prefix)


def _sentence(count: int, chosen: Candidate, prefix: str, beside: list[str], rivals: list[str]) -> str:
    """Returns what was found: how many tensors, where, under which prefix, beside what, and what was not taken."""
    where = f"under '{chosen.key}'" if chosen.path else "at the top level"
    kind = "state dict with" if isinstance(chosen.content, Mapping) else "list of"
    sentence = f"{kind} {count} tensors {where}"
    if any(isinstance(value, HeldArray) for value in chosen.values.values()):
        sentence += ", as NumPy arrays"
    if prefix:
        sentence += f", prefix '{prefix}' removed from every name"
    if beside:
        sentence += f"; beside it: {', '.join(beside[:6])}{' …' if len(beside) > 6 else ''}"
    if rivals and len(rivals) <= 6:
        sentence += f"; not taken: {', '.join(rivals)}"
    return sentence


def _keys(content: object) -> list[str]:
    return [shortened(key) for key in content] if isinstance(content, Mapping) else []


def _candidates(content: object, path: tuple[object, ...], seen: set[int]) -> list[Candidate]:
    # A mapping may hold one many times, and itself.
    if len(path) > _MAX_DEPTH or id(content) in seen:
        return []
    if isinstance(content, list | tuple):
        seen.add(id(content))
        return [Candidate(path, content)] if content and all(tensor_in(part) is not None for part in content) else []
    if not isinstance(content, Mapping):
        return []
    seen.add(id(content))
    candidates = []
    if _holds_tensors(content):
        candidates.append(Candidate(path, content))
    for key, value in content.items():
        if isinstance(value, Mapping | list | tuple) and not str(key).lower().startswith(_NOT_SEARCHED):
            candidates += _candidates(value, (*path, key), seen)
    return candidates


def _holds_tensors(content: Mapping) -> bool:
    return any(map(is_tensor, content.values())) and all(isinstance(key, str) for key in content)


def _rank(candidate: Candidate) -> tuple[bool, bool, int, int, int]:
    # Single numbers beside a model (a loss, a learning rate) do not make a state dict.
    held = [value for value in candidate.values.values() if is_tensor(value)]
    tensors = sum((tensor := tensor_in(value)) is None or tensor.dim() > 0 for value in held)
    keys = [shortened(key).lower() for key in candidate.path]
    names = [_WRAPPERS.index(key) for key in keys if key in _WRAPPERS]
    is_list = not isinstance(candidate.content, Mapping)
    place = names[-1] if names else len(_WRAPPERS)
    return (is_list, not candidate.is_usual, -tensors, place, len(keys))


def _without_prefixes(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    removed = ""
    while state and (prefix := next((p for p in _PREFIXES if _is_shared(p, state)), None)):
        state = {name[len(prefix) :]: value for name, value in state.items()}
        removed += prefix
    return state, removed


def _is_shared(prefix: str, names: Iterable[str]) -> bool:
    return all(name.startswith(prefix) for name in names)


def is_usual_key(key: str) -> bool:
    """Returns whether training scripts keep a state dict under a key, or at the top level.

    Example:
        >>> [is_usual_key(key) for key in ("", "checkpoint.model", "discriminator")]
        [True, True, False]
    """
    return not key or any(part.lower() in _WRAPPERS for part in key.split("."))


def is_of_training(key: object, value: object) -> bool:
    """Returns whether what stands under a key is state of the training: of an optimizer, a scheduler, random numbers.

    Example:
        >>> [is_of_training(*entry) for entry in (("optimizer_states", [{}]), ("optimizer", "adam"), ("epoch", 3))]
        [True, False, False]
    """
    if not isinstance(key, str) or value is None or isinstance(value, str | bool | int | float):
        return False
    words = _words(key)
    return not _TRAINING.isdisjoint(words) or any(word.startswith(_TRAINING_STARTS) for word in words)


def is_average(name: str) -> bool:
    """Returns whether a name says that it belongs to averaged weights, such as those of an EMA.

    Example:
        >>> [is_average(name) for name in ("params_ema", "ema_model.0.weight", "schema.weight")]
        [True, True, False]
    """
    return not _AVERAGES.isdisjoint(_words(name))


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", name.lower())


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
