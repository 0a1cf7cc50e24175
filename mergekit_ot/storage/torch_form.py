"""The form of what ``torch.save`` and ``pickle`` write: the weights in their wrappers, and what stands beside them."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from mergekit_ot.storage.file_options import STATE_DICT
from mergekit_ot.storage.forms import AbstractForm
from mergekit_ot.storage.limits import shortened
from mergekit_ot.storage.marks import MARK, YAML_COMMENT
from mergekit_ot.storage.pickled_arrays import HeldArray
from mergekit_ot.storage.pickled_tensors import is_tensor
from mergekit_ot.storage.plain_data import NotPlainError, PlainCopy
from mergekit_ot.storage.state_dicts import Candidate, is_average, is_of_training
from mergekit_ot.storage.torch_stream import torch_stream

# Names that end so are of other forms.
_OTHER_SUFFIXES = (".safetensors", ".npz", ".pt2")
_PICKLE_PROTOCOL = 4


@final
class PlainForm(AbstractForm):
    """A bare state dict, which ``torch.load`` gives to ``load_state_dict``."""

    name = STATE_DICT

    def write(self, path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Writes names and tensors, and nothing else."""
        with torch_stream(path) as stream:
            torch.save(OrderedDict(state), stream)

    def has_room(self, path: Path) -> bool:
        """Returns False: there are only tensors."""
        return False

    def suits(self, path: Path) -> bool:
        """Returns whether no other format goes by this name."""
        return path.suffix not in _OTHER_SUFFIXES


@final
class WrappedForm(AbstractForm):
    """A state dict, or a list of tensors, where it stood in a file, with the entries beside it that are plain data.

    State of the training is left out, and so are averaged copies of the weights, which would be those of the source.

    Args:
        content: What stands in the file.
        chosen: The state dict in it.
        candidates: All state dicts in it.
        prefix: What was taken off every name.
        is_pickle: Whether the file is a pickle without a format of torch around it.
    """

    name = "file"

    def __init__(
        self, content: object, chosen: Candidate, candidates: Sequence[Candidate], prefix: str = "", *, is_pickle: bool
    ) -> None:
        self._chosen, self._prefix, self._is_pickle = chosen, prefix, is_pickle
        self._levels: list[tuple[Mapping, object]] = []
        for key in chosen.path:
            if isinstance(content, Mapping):
                self._levels.append((content, key))
                content = content[key]
        self._stale = [other.path for other in candidates if _is_copy(other, chosen)]

    def write(self, path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Writes the file with other weights."""
        copy = PlainCopy()
        content = self._weights(state, copy)
        for depth, (mapping, key) in reversed(list(enumerate(self._levels))):
            kept, _ = self._kept(depth, mapping, copy)
            content = {name: content if name == key else kept[name] for name in mapping if name == key or name in kept}
        if self._is_pickle:
            with path.open("wb") as stream:
                pickle.dump(content, stream, protocol=_PICKLE_PROTOCOL)
                # Whoever loads a pickle reads to its end, and not what follows.
                stream.write(b"\n" + YAML_COMMENT.format(MARK).encode() + b"\n")
            return
        with torch_stream(path) as stream:
            torch.save(content, stream)

    def has_room(self, path: Path) -> bool:
        """Returns False: an entry of ours would be one too many for whoever reads the file."""
        return False

    def suits(self, path: Path) -> bool:
        """Returns whether no other format goes by this name."""
        return path.suffix not in _OTHER_SUFFIXES

    def sentences(self) -> list[str]:
        """Returns what is kept beside the weights, and what is left out."""
        copy, kept, lost = PlainCopy(), [], []
        for depth, (mapping, _) in enumerate(self._levels):
            beside, dropped = self._kept(depth, mapping, copy)
            kept += [shortened(name) for name in beside]
            lost += dropped
        if isinstance(self._chosen.content, Mapping):
            inside, dropped = self._plain_entries(self._chosen.content, copy)
            kept += [shortened(name) for name in inside]
            lost += dropped
        said = []
        if kept:
            said.append(f"kept beside the weights as they are: {_listed(kept)}")
        if lost:
            said.append(f"left out: {_listed(lost)}")
        return said

    def _weights(self, state: Mapping[str, Tensor], copy: PlainCopy) -> Any:
        values = self._chosen.values
        arrays = {name for name, value in values.items() if isinstance(value, HeldArray)}
        tensors = {self._prefix + name: tensor for name, tensor in state.items()}
        made = {
            name: tensor.numpy() if self._is_pickle or name in arrays else tensor for name, tensor in tensors.items()
        }
        content = self._chosen.content
        if not isinstance(content, Mapping):
            listed = [made[name] for name in values if name in made]
            return tuple(listed) if isinstance(content, tuple) else listed
        entries, _ = self._plain_entries(content, copy)
        ordered = {name: made.get(name, entries.get(name)) for name in content if name in made or name in entries}
        return OrderedDict({**ordered, **made})

    def _plain_entries(self, content: Mapping, copy: PlainCopy) -> tuple[dict[Any, Any], list[str]]:
        """Returns the entries of a state dict that are no tensors."""
        others = {name: value for name, value in content.items() if not is_tensor(value)}
        return self._kept(len(self._levels), others, copy)

    def _kept(self, depth: int, mapping: Mapping, copy: PlainCopy) -> tuple[dict[Any, Any], list[str]]:
        """Returns the entries beside the weights that are kept, and those that are not, with the reasons."""
        path = self._chosen.path[:depth]
        kept: dict[Any, Any] = {}
        lost = []
        for key, value in mapping.items():
            place = (*path, key)
            if place == self._chosen.path[: depth + 1]:
                continue
            if any(other[: depth + 1] == place for other in self._stale):
                lost.append(f"{shortened(key)} (another copy of the source's weights)")
            elif is_of_training(key, value):
                lost.append(f"{shortened(key)} (state of the training)")
            else:
                try:
                    kept[key] = copy.of(value)
                except NotPlainError as failure:
                    lost.append(f"{shortened(key)} (no plain data: {shortened(str(failure))})")
        return kept, lost


def _is_copy(other: Candidate, chosen: Candidate) -> bool:
    """Whether two state dicts are the weights and their average over the training."""
    if other is chosen or is_average(other.key) == is_average(chosen.key):
        return False
    return is_average(other.key) or other.values.keys() == chosen.values.keys()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
