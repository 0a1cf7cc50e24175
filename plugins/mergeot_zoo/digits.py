"""Scikit-learn's handwritten digits, which come with the package and need no download."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergekit_ot import DataError

_TEST_SIZE = 500
_SPLITS = ("train", "test")
_Arrays = tuple[Float[np.ndarray, "n 1 8 8"], Int[np.ndarray, " n"]]


class Digits:
    """Batches of digits, which can be read from the start any number of times.

    Args:
        inputs: Images, from 0 to 1.
        targets: The digit in each image.
        batch: Largest number of rows in one batch.
    """

    def __init__(self, inputs: Float[Tensor, "n 1 8 8"], targets: Int[Tensor, " n"], batch: int) -> None:
        self._inputs, self._targets, self._batch = inputs, targets, batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self._inputs.split(self._batch), self._targets.split(self._batch), strict=True)

    def __len__(self) -> int:
        return -(-len(self._inputs) // self._batch)


def digits(split: str = "test", batch: int = 256, limit: int | None = None, seed: int = 0) -> Digits:
    """Returns one part of the 1,797 digits as batches of ``inputs [n, 1, 8, 8]`` and ``targets [n]``.

    The split is stratified and always the same: 1,297 digits for training, 500 for testing. The test part comes in
    a fixed order, the train part shuffled.

    Args:
        split: ``train`` or ``test``.
        batch: Rows of one batch.
        limit: Use only so many digits of the part.
        seed: Order of the train part.

    Raises:
        DataError: scikit-learn is not installed, or an argument is wrong.
    """
    if split not in _SPLITS:
        raise DataError(f"split={split!r} of data 'digits' does not exist. Use {' or '.join(_SPLITS)}.")
    for name, value in (("batch", batch), ("limit", limit)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise DataError(f"{name}={value!r} of data 'digits' is not a positive whole number. Use {name}=100.")
    images, labels = _parts()[split]
    inputs, targets = torch.from_numpy(images.copy()), torch.from_numpy(labels.copy())
    if split == "train":
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
        inputs, targets = inputs[order], targets[order]
    return Digits(inputs[:limit], targets[:limit], batch)


@functools.cache
def _parts() -> dict[str, _Arrays]:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError(
            "Data 'digits' comes with scikit-learn, which is not installed. "
            'Install it with: pip install "mergekit-ot[demo]".'
        ) from error
    bunch = load_digits()
    images = (bunch.images / 16).astype(np.float32)[:, None]
    x_train, x_test, y_train, y_test = train_test_split(
        images, bunch.target.astype(np.int64), test_size=_TEST_SIZE, random_state=0, stratify=bunch.target
    )
    return {"train": (x_train, y_train), "test": (x_test, y_test)}
