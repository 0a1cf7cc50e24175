"""Batches as people have them, taken apart: tensors, pairs, triples and dictionaries become inputs and targets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from mergekit_ot.errors import DataError
from mergekit_ot.progress import Notify

Batch = tuple[Any, Tensor | None]

# Targets of this value count for nothing: that of torch's losses.
IGNORED = -100
_LABELS = ("labels", "label", "targets", "target", "y", "class", "fine_label")
# What the one input of a network is called where forward calls it otherwise.
_INPUTS = ("input_ids", "pixel_values", "inputs", "input", "image", "images", "img", "data", "features", "audio")
_HELP = "A data SPEC gives batches: a tensor of inputs, (inputs, targets), or a dictionary with names of inputs."


@runtime_checkable
class _InOrder(Protocol):
    """A module whose forward takes inputs in order, and which says what they are called."""

    mergeot_inputs: tuple[str, ...]


@dataclass(frozen=True)
class ForwardArguments:
    """What a network's forward takes by position.

    Attributes:
        names: Of all, in order; empty where forward does not say.
        needed: How many of them it needs; None where that is not known.

    Example:
        >>> forward_arguments(nn.Bilinear(2, 3, 4))
        ForwardArguments(names=('input1', 'input2'), needed=2)
    """

    names: tuple[str, ...] = ()
    needed: int | None = None


def forward_arguments(module: nn.Module) -> ForwardArguments:
    """Returns what a module's forward takes by position.

    Example:
        >>> forward_arguments(nn.Linear(2, 3)).names
        ('input',)
    """
    if isinstance(module, _InOrder):
        return ForwardArguments(module.mergeot_inputs, len(module.mergeot_inputs))
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return ForwardArguments()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = [each for each in parameters if each.kind in positional]
    needed = sum(each.default is inspect.Parameter.empty for each in taken)
    is_open = any(each.kind is inspect.Parameter.VAR_POSITIONAL for each in parameters)
    return ForwardArguments(tuple(each.name for each in taken), None if is_open else needed)


@dataclass
class BatchReader:
    """Takes batches apart, as a network wants them.

    Attributes:
        forward: What the network takes.
        input_key: Which entries are the inputs: keys, or places from 0, with commas between; None matches names.
        label_key: Which entry is the targets; None looks for a usual name.
        data: What the batches belong to, for messages.
        notify: Told what was left out, once.
        reads_targets: Whether targets are taken; otherwise nobody looks at them.

    Example:
        >>> reader = BatchReader(forward_arguments(nn.Linear(2, 3)))
        >>> inputs, targets = reader.take({"image": torch.zeros(4, 2), "label": torch.ones(4).long()}, 0)
        >>> tuple(inputs.shape), targets.tolist()
        ((4, 2), [1, 1, 1, 1])
    """

    forward: ForwardArguments = ForwardArguments()
    input_key: str | None = None
    label_key: str | None = None
    data: str = "the data"
    notify: Notify | None = None
    reads_targets: bool = True
    _told: set[str] = field(default_factory=set, repr=False)

    def take(self, item: Any, number: int) -> Batch:
        """Returns inputs (a tensor, or a tuple of several) and targets, or None where there are none.

        Args:
            item: The batch.
            number: Its place, for messages.

        Raises:
            DataError: It holds no tensor, or it cannot be told which of its entries are meant.
        """
        if isinstance(item, Mapping):
            inputs, targets = self._of_mapping(item, number)
        elif isinstance(item, tuple | list):
            inputs, targets = self._of_sequence(item, number)
        else:
            inputs, targets = (self._tensor(item, number),), None
        return (inputs[0] if len(inputs) == 1 else inputs), targets

    def _of_sequence(self, item: Sequence[Any], number: int) -> tuple[tuple[Tensor, ...], Tensor | None]:
        if not item:
            raise DataError(f"Batch {number} of {self.data} (counted from 0) is empty. {_HELP}")
        if self.input_key is not None or self.label_key is not None:
            return self._of_mapping({str(place): value for place, value in enumerate(item)}, number)
        first, rest = item[0], list(item[1:])
        if isinstance(first, Mapping):
            inputs, own = self._of_mapping(first, number)
            return inputs, self._targets(rest[0], number) if rest else own
        if isinstance(first, tuple | list):
            inputs = tuple(self._tensor(part, number) for part in first)
        else:
            count = self._inputs_in(item)
            inputs, rest = tuple(self._tensor(part, number) for part in item[:count]), list(item[count:])
        if len(rest) > 1:
            self._tell(f"Of every batch of {self.data} the last {len(rest) - 1} of {len(item)} entries are left out.")
        return inputs, self._targets(rest[0], number) if rest else None

    def _inputs_in(self, item: Sequence[Any]) -> int:
        """Returns how many entries of a flat batch are inputs; one follows them that is the targets, if any does."""
        needed = self.forward.needed or 1
        return needed if 1 < needed <= len(item) else 1

    def _of_mapping(self, item: Mapping[Any, Any], number: int) -> tuple[tuple[Tensor, ...], Tensor | None]:
        names = self.forward.names
        needed = names[: self.forward.needed or 0]
        label = self.label_key
        if label is None:
            label = next((key for key in _LABELS if key in item and key not in needed), None)
        elif label not in item:
            raise DataError(f"{self._no_key(label, item, number)} Correct --label-key.")
        keys = self._input_keys(item, label, number)
        inputs = tuple(self._tensor(item[key], number) for key in keys)
        targets = None if label is None else self._targets(item[label], number)
        left = sorted(str(key) for key, value in item.items() if key not in (*keys, label) and _is_array(value))
        if left:
            self._tell(f"Of every batch of {self.data} is left out: {', '.join(left)}.")
        if targets is not None and _is_repeated(inputs[0], targets):
            self._tell(f"'{label}' of {self.data} repeats the tokens: each predicts the next, as language models do.")
            targets = torch.cat([targets[:, 1:], torch.full_like(targets[:, :1], IGNORED)], 1)
        return inputs, targets

    def _input_keys(self, item: Mapping[Any, Any], label: str | None, number: int) -> list[Any]:
        """Returns the keys of the inputs, in the order in which forward takes them."""
        if self.input_key is not None:
            keys = self.input_key.split(",")
            for key in keys:
                if key not in item:
                    raise DataError(f"{self._no_key(key, item, number)} Correct --input-key.")
            return keys
        names = self.forward.names
        keys = [name for name in names if name in item and name != label]
        others = [key for key, value in item.items() if key != label and _is_array(value)]
        if not keys:
            keys = [key for key in _INPUTS if key in others][:1]
        if not keys and all(isinstance(key, str) and key.isdigit() for key in others):
            keys = others[:1]
        wanted = f"forward takes {', '.join(names)}" if names else "what forward takes is not known"
        if not keys:
            raise DataError(
                f"Batch {number} of {self.data} (counted from 0) has dict where a tensor is needed, and no key of it "
                f"({_listed(item)}) is known to be an input: {wanted}. Say which: --input-key KEY (or KEY,KEY)."
            )
        before = names[: max(names.index(key) for key in keys) + 1] if set(keys) <= set(names) else ()
        missing = [name for name in before if name not in keys]
        if missing:
            raise DataError(
                f"Batch {number} of {self.data} (counted from 0) has {_listed(item)}, and {wanted}: '{missing[0]}' "
                f"stands before what is given. Add it to the batches, or choose with --input-key {keys[0]}."
            )
        return keys

    def _no_key(self, key: str, item: Mapping[Any, Any], number: int) -> str:
        return f"Batch {number} of {self.data} (counted from 0) has no '{key}': it has {_listed(item)}."

    def _targets(self, value: Any, number: int) -> Tensor | None:
        return None if value is None or not self.reads_targets else self._tensor(value, number, "targets")

    def _tensor(self, value: Any, number: int, what: str = "inputs") -> Tensor:
        if isinstance(value, Tensor):
            return value
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            return torch.from_numpy(np.ascontiguousarray(value))
        raise DataError(
            f"Batch {number} of {self.data} (counted from 0) has {type(value).__name__} where a tensor is needed, for "
            f"its {what}. {_HELP}"
        )

    def _tell(self, sentence: str) -> None:
        if self.notify is not None and sentence not in self._told:
            self._told.add(sentence)
            self.notify(sentence)


class TakenData:
    """Data that a network takes: batches of any form, each as (inputs, targets); read anew each time.

    Args:
        data: An iterable of batches, or a callable that returns one.
        reader: Takes them apart.

    Example:
        >>> reader = BatchReader(forward_arguments(nn.Linear(2, 3)))
        >>> [targets for _, targets in TakenData([torch.zeros(4, 2)], reader)]
        [None]
    """

    def __init__(self, data: Iterable[Any] | Callable[[], Iterable[Any]], reader: BatchReader) -> None:
        self._data, self._reader = data, reader

    def __iter__(self) -> Iterator[Batch]:
        data = self._data if isinstance(self._data, Iterable) else self._data()
        for number, item in enumerate(data):
            yield self._reader.take(item, number)


def taken(
    data: Iterable[Any], module: nn.Module, what: str = "the data", *, reads_targets: bool = True
) -> Iterable[Batch]:
    """Returns data as a network takes them; what can be read only once stays so.

    Args:
        data: Batches of any form.
        module: The network; it is not run.
        what: What the batches belong to, for messages.
        reads_targets: Whether targets are taken; otherwise nobody looks at them.

    Example:
        >>> [tuple(inputs.shape) for inputs, _ in taken([{"input": torch.zeros(4, 2)}], nn.Linear(2, 3))]
        [(4, 2)]
    """
    reader = BatchReader(forward_arguments(module), data=what, reads_targets=reads_targets)
    found = TakenData(data, reader)
    return iter(found) if iter(data) is data else found


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _is_repeated(inputs: Tensor, targets: Tensor) -> bool:
    """Whether the targets are the input tokens themselves, as libraries of language models have them."""
    if inputs.ndim != 2 or inputs.shape != targets.shape or inputs.is_floating_point() or targets.is_floating_point():
        return False
    counted = targets != IGNORED
    return bool(counted.any()) and bool((inputs == targets)[counted].all())


def _listed(item: Mapping[Any, Any]) -> str:
    return ", ".join(str(key)[:80] for key in list(item)[:20]) or "nothing"
