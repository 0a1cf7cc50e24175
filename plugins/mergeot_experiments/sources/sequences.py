"""Sequences that transformers are trained on: characters of a text, gray levels of digits, and digits in a row."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergekit_ot import DataError
from mergekit_ot.errors import unknown_name
from mergeot_experiments.sources.data import IMAGE_SETS, VARIABLE, has_folder

Inputs = Tensor | tuple[Tensor, ...]
Samples = tuple[Inputs, Int[Tensor, "n ..."]]

_BATCH = 100
_TRAINING, _TEST, _CALIBRATION = 6000, 500, 500
_TEXT, _LENGTH = "tinyshakespeare.txt", 64
_CHARACTERS = 65
# Characters of the text stand behind each other; its last tenth is for tests.
_TEST_SHARE = 0.1
# Places that a masked network has to fill in.
_HIDDEN = 0.3
# Gray levels of scikit-learn's digits, from 0 to 16, and digits that stand in a row.
_LEVELS, _IN_A_ROW = 17, 4


class DataSet(Protocol):
    """What sources are trained on, scored on and calibrated with."""

    @property
    def source(self) -> str:
        """Where it is from: what differs in this does not belong into one fusion."""
        ...

    def training_images(self) -> Samples:
        """Returns the inputs to train on, and their targets."""
        ...

    def test_batches(self) -> Sequence[Samples]:
        """Returns inputs and targets that nothing is trained on."""
        ...

    def calibration_batches(self) -> Sequence[Samples]:
        """Returns inputs for solvers and repairs that need some; they never read the targets."""
        ...


@dataclass(frozen=True)
class SequenceSet:
    """Sequences under one name.

    Attributes:
        name: What a training calls its data.
        of_part: Gives so many samples of the part ``train`` or ``test``, drawn by a seed.
    """

    name: str
    of_part: Callable[[str, int, int], Samples]

    @property
    def source(self) -> str:
        """Where it is from."""
        return self.name

    def training_images(self) -> Samples:
        """Returns the sequences to train on, and their targets.

        Raises:
            DataError: The data are not there.
        """
        return self.of_part("train", _TRAINING, 0)

    def test_batches(self) -> Sequence[Samples]:
        """Returns sequences and targets of the test part in batches.

        Raises:
            DataError: The data are not there.
        """
        return _in_batches(self.of_part("test", _TEST, 1))

    def calibration_batches(self) -> Sequence[Samples]:
        """Returns sequences of the training part for solvers and repairs that need some.

        Raises:
            DataError: The data are not there.
        """
        return _in_batches(self.of_part("train", _CALIBRATION, 2))


def data_set(name: str) -> DataSet:
    """Returns the images or sequences of that name.

    Raises:
        DataError: There are none.
    """
    known: dict[str, DataSet] = {**IMAGE_SETS, **SEQUENCE_SETS}
    if name not in known:
        raise DataError(unknown_name("data", name, known))
    return known[name]


def rows_of(inputs: Inputs, rows: Tensor | slice) -> Inputs:
    """Returns some samples of the inputs.

    Example:
        >>> [part.shape for part in rows_of((torch.zeros(5, 2), torch.zeros(5)), slice(3))]
        [torch.Size([3, 2]), torch.Size([3])]
    """
    return tuple(part[rows] for part in inputs) if isinstance(inputs, tuple) else inputs[rows]


def _in_batches(samples: Samples) -> list[Samples]:
    inputs, targets = samples
    starts = range(0, len(targets), _BATCH)
    return [(rows_of(inputs, slice(k, k + _BATCH)), targets[k : k + _BATCH]) for k in starts]


def _next(windows: Int[Tensor, "n place"], symbols: int) -> Samples:
    """Every token is to be told from those before it."""
    return windows[:, :-1], windows[:, 1:]


def _hidden(windows: Int[Tensor, "n place"], symbols: int) -> Samples:
    """Some tokens are hidden behind a mark of their own, and all are to be told."""
    tokens = windows[:, :-1]
    is_hidden = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(len(tokens))) < _HIDDEN
    return tokens.masked_fill(is_hidden, symbols), tokens


def _second_half(windows: Int[Tensor, "n place"], symbols: int) -> Samples:
    """The first half is read, and the second one written token by token."""
    half = (windows.shape[1] - 1) // 2
    return (windows[:, :half], windows[:, half : 2 * half]), windows[:, half + 1 : 2 * half + 1]


def _of_text(make: Callable[[Tensor, int], Samples], part: str, count: int, seed: int) -> Samples:
    text = _text()
    end = round(len(text) * (1 - _TEST_SHARE))
    piece = text[:end] if part == "train" else text[end:]
    starts = torch.randint(len(piece) - _LENGTH, (count,), generator=torch.Generator().manual_seed(seed))
    return make(piece[starts[:, None] + torch.arange(_LENGTH + 1)], _CHARACTERS)


def _of_levels(make: Callable[[Tensor, int], Samples], part: str, count: int, seed: int) -> Samples:
    images, _ = _digits(part)
    levels = (images * (_LEVELS - 1)).round().long().flatten(1)[:count]
    # A first column like the last one, so that there is something before the first pixel.
    return make(torch.cat([levels, levels[:, :1]], 1), _LEVELS)


def _of_rows(part: str, count: int, seed: int) -> Samples:
    """Digits that stand side by side are read, and their names written, each with the ones before it known."""
    images, digits = _digits(part)
    chosen = torch.randint(len(images), (count, _IN_A_ROW), generator=torch.Generator().manual_seed(seed))
    signal = torch.cat(list(images[chosen].unbind(1)), 2)
    names = digits[chosen]
    written = torch.cat([torch.full((count, 1), 10), names[:, :-1]], 1)
    return (signal, written), names


@functools.cache
def _text() -> Int[Tensor, " place"]:
    if not has_folder():
        raise DataError(
            f"This experiment reads '{_TEXT}' from a data folder, and the environment variable {VARIABLE} names none. "
            f"Set {VARIABLE} to a folder that holds it, or take '--quick' without it, which runs on digits."
        )
    path = Path(os.environ[VARIABLE], _TEXT)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The experiment cannot read '{path}': {error}. Put the text there as UTF-8.") from error
    characters = sorted(set(text))
    if len(characters) > _CHARACTERS or len(text) < 100 * _LENGTH:
        raise DataError(
            f"'{path}' has {len(characters)} different characters and {len(text):,} in all; the networks take at most "
            f"{_CHARACTERS}, and {100 * _LENGTH:,} are needed at least. Put the text there that it is called after."
        )
    number = {character: place for place, character in enumerate(characters)}
    return torch.tensor([number[character] for character in text])


@functools.cache
def _digits(part: str) -> tuple[Float[Tensor, "n row column"], Int[Tensor, " n"]]:
    images = IMAGE_SETS["digits"]
    batches = [images.training_images()] if part == "train" else images.test_batches()
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs)[:, 0], torch.cat(targets)


_MAKERS = {"next": _next, "hidden": _hidden, "halves": _second_half}
_SETS = [SequenceSet("digits-in-a-row", _of_rows)]
for _name, _make in _MAKERS.items():
    _SETS.append(SequenceSet(f"characters-{_name}", functools.partial(_of_text, _make)))
    _SETS.append(SequenceSet(f"levels-{_name}", functools.partial(_of_levels, _make)))
SEQUENCE_SETS = {sequence_set.name: sequence_set for sequence_set in _SETS}
