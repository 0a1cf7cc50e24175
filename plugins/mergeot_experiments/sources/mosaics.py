"""Images kept as a few large pictures: lossless, and smaller than an archive."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mergekit_ot import DataError

_TILE = 32


def read_mosaics(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns images ``[n, 32, 32, 3]`` and labels of one part of a data set.

    Args:
        folder: Holds ``train_1.webp`` … or ``test.webp``, rows of tiles of 32 by 32 pixels read line by line, and
            ``labels.npz`` with arrays ``y_train`` and ``y_test``.
        split: ``train`` or ``test``.

    Raises:
        DataError: A file is missing or is no such picture.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"Pillow reads '{folder}'. Install it with: pip install pillow.") from error
    # By number: the tenth picture comes after the ninth.
    paths = sorted(folder.glob(f"{split}*.webp"), key=lambda path: (len(path.name), path.name))
    try:
        with np.load(folder / "labels.npz", allow_pickle=False) as archive:
            labels = archive[f"y_{split}"]
        parts = [_tiles(np.asarray(Image.open(path).convert("RGB"))) for path in paths]
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"Cannot read '{folder}': {error}. It needs labels.npz and {split}.webp or more.") from error
    images = np.concatenate(parts) if parts else np.empty((0, _TILE, _TILE, 3), np.uint8)
    if len(images) != len(labels) or not len(labels):
        raise DataError(
            f"'{folder}' has {len(labels)} labels and {len(images)} images of its part '{split}'. "
            "Put every picture of the set there."
        )
    return images, labels


def _tiles(picture: np.ndarray) -> np.ndarray:
    rows, columns = picture.shape[0] // _TILE, picture.shape[1] // _TILE
    tiles = picture.reshape(rows, _TILE, columns, _TILE, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiles).reshape(-1, _TILE, _TILE, 3)
