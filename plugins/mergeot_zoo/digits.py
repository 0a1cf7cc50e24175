"""Scikit-learn's bundled handwritten digits: 1,797 images of 8 × 8 pixels, no download."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergekit_ot.errors import DataError, unknown_name

_SPLITS = ("train", "test")
_TEST_SIZE = 500
_LARGEST_PIXEL = 16

Batch = tuple[Float[Tensor, "batch 1 8 8"], Int[Tensor, " batch"]]


def digits(split: str = "test", batch: int = 256, limit: int | None = None, seed: int = 0) -> list[Batch]:
    """Returns the digits as (inputs, targets) batches, pixels in [0, 1].

    The 500 digits for testing are always the same, every class in its share.

    Args:
        split: ``train`` or ``test``.
        batch: Images in a batch; the last may be smaller.
        limit: Images at most.
        seed: Of the order of the training images; those for testing keep theirs.

    Raises:
        DataError: Scikit-learn is not installed, or an argument cannot be used.
    """
    if split not in _SPLITS:
        raise DataError(unknown_name("part of the digits", split, _SPLITS))
    if batch < 1 or (limit is not None and limit < 1):
        raise DataError(f"The digits cannot be given with batch={batch} and limit={limit}. Give at least one of each.")
    pixels, labels = _load(split)
    if split == "train":
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        pixels, labels = pixels[order], labels[order]
    pixels, labels = pixels[:limit], labels[:limit]
    return list(zip(pixels.split(batch), labels.split(batch), strict=True))


def _load(split: str) -> Batch:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError(
            "The digits come with scikit-learn, which is not installed. Run: pip install 'mergekit-ot[demo]'"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    scaled = (pixels / _LARGEST_PIXEL).astype(np.float32).reshape(-1, 1, 8, 8)
    splits = train_test_split(scaled, labels, test_size=_TEST_SIZE, random_state=0, stratify=labels)
    part = _SPLITS.index(split)
    return torch.from_numpy(splits[part]), torch.from_numpy(splits[2 + part]).long()
