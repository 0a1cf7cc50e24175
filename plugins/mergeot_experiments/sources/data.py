"""The images that the experiments train and test on: MNIST and CIFAR-10 out of a folder, or scikit-learn's digits."""

from __future__ import annotations

import functools
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mergekit_ot import DataError, resolve_data
from mergekit_ot.errors import unknown_name
from mergeot_experiments.sources.mosaics import read_mosaics

VARIABLE = "MERGEOT_DATA"
Images = tuple[Float[Tensor, "n channel height width"], Int[Tensor, " n"]]

_TEST_BATCH = 1000
_CALIBRATION = 2000
# One source saw every image of this digit, and a tenth of the others; arXiv:2210.06671 and arXiv:1910.05653.
_SPECIAL_DIGIT = 4
_SHARE = 0.1
_SPLIT_SEED = 543


@dataclass(frozen=True)
class ImageSet:
    """Training and test images under one name.

    Attributes:
        name: What a training calls its data; it decides the trained network's place in the cache.
        source: ``mnist`` or ``cifar10`` (in the data folder), or ``digits`` (bundled with scikit-learn).
        count: The first so many training images are taken; all of them where it is None.
        mean: Taken from every pixel, which is in [0, 1] before; one for all channels, or one each.
        deviation: Divides every pixel after that.
        part: ``all`` training images, ``special`` (all of one digit and a tenth of the others), or ``rest``.
    """

    name: str
    source: str
    count: int | None = None
    mean: float | tuple[float, ...] = 0.0
    deviation: float | tuple[float, ...] = 1.0
    part: str = "all"

    def training_images(self) -> Images:
        """Returns the images to train on, and their digits.

        Raises:
            DataError: The data are not there.
        """
        pixels, digits = (array[: self.count] for array in _arrays(self.source, "train"))
        inputs, targets = self._scaled(pixels), torch.from_numpy(digits).long()
        if self.part == "all":
            return inputs, targets
        chosen = special_part(targets) if self.part == "special" else ~special_part(targets)
        return inputs[chosen], targets[chosen]

    def test_batches(self) -> Sequence[Images]:
        """Returns all test images in batches; the parts of one set have the same.

        Raises:
            DataError: The data are not there.
        """
        pixels, digits = _arrays(self.source, "test")
        inputs, targets = self._scaled(pixels), torch.from_numpy(digits).long()
        return list(zip(inputs.split(_TEST_BATCH), targets.split(_TEST_BATCH), strict=True))

    def calibration_batches(self) -> Sequence[Images]:
        """Returns training images for solvers and repairs that need some; they never read the digits.

        Raises:
            DataError: The data are not there.
        """
        pixels, digits = (array[:_CALIBRATION] for array in _arrays(self.source, "train"))
        return [(self._scaled(pixels), torch.from_numpy(digits).long())]

    def _scaled(self, pixels: np.ndarray) -> Float[Tensor, "n channel height width"]:
        inputs = torch.from_numpy(np.ascontiguousarray(pixels)).float()
        inputs = inputs.movedim(-1, 1).contiguous() if inputs.ndim == 4 else inputs[:, None]
        if pixels.dtype == np.uint8:
            inputs = inputs.div_(255)
        if self.mean == 0 and self.deviation == 1:
            return inputs
        mean, deviation = (torch.tensor(value).reshape(-1, 1, 1) for value in (self.mean, self.deviation))
        return inputs.sub_(mean).div_(deviation)


def _of_mnist(name: str, **options: object) -> ImageSet:
    return ImageSet(name, "mnist", 54_000, **options)  # type: ignore[arg-type]


_NORMALISED = {"mean": 0.1307, "deviation": 0.3081}
_SETS = (
    _of_mnist("mnist-54000"),
    _of_mnist("mnist-normalised-54000", **_NORMALISED),
    _of_mnist("mnist-normalised-54000-special", **_NORMALISED, part="special"),
    _of_mnist("mnist-normalised-54000-rest", **_NORMALISED, part="rest"),
    ImageSet("cifar10", "cifar10", mean=(0.4914, 0.4822, 0.4465), deviation=(0.2023, 0.1994, 0.2010)),
    ImageSet("digits", "digits"),
    ImageSet("digits-special", "digits", part="special"),
    ImageSet("digits-rest", "digits", part="rest"),
)
IMAGE_SETS = {image_set.name: image_set for image_set in _SETS}


def image_set(name: str) -> ImageSet:
    """Returns the images of that name.

    Raises:
        DataError: There are none.
    """
    if name not in IMAGE_SETS:
        raise DataError(unknown_name("images", name, IMAGE_SETS))
    return IMAGE_SETS[name]


def has_folder() -> bool:
    """Returns whether a data folder is named."""
    return bool(os.environ.get(VARIABLE))


def special_part(targets: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Returns which images the first source of the heterogeneous experiment saw, the same each time.

    Example:
        >>> chosen = special_part(torch.arange(1000) % 10)
        >>> int(chosen.sum()), int(chosen[4::10].sum())
        (190, 100)
    """
    chosen = targets == _SPECIAL_DIGIT
    others = torch.nonzero(~chosen)[:, 0]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    chosen[others[order[: round(_SHARE * len(others))]]] = True
    return chosen


# The largest set has 47 MB as bytes; the networks of one experiment all read the same.
@functools.lru_cache(maxsize=4)
def _arrays(source: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    if source == "digits":
        inputs, targets = zip(*resolve_data(f"digits?split={split}")(), strict=True)
        return torch.cat(inputs)[:, 0].numpy(), torch.cat(targets).numpy()
    return _read_archive(source, split)


def _read_archive(source: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    if not has_folder():
        raise DataError(
            f"This experiment reads '{source}.npz' from a data folder, and the environment variable {VARIABLE} names "
            f"none. Set {VARIABLE} to a folder that holds it (arrays x_train, y_train, x_test, y_test of plain bytes), "
            "or take '--quick' without it, which runs on scikit-learn's digits."
        )
    path = Path(os.environ[VARIABLE]) / f"{source}.npz"
    if not path.exists() and path.with_suffix("").is_dir():
        return read_mosaics(path.with_suffix(""), split)
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive[f"x_{split}"], archive[f"y_{split}"]
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"The experiment cannot read '{path}': {error}. It needs the arrays x_train, y_train, x_test and y_test; "
            f"put the file into the folder that {VARIABLE} names, or name another folder."
        ) from error
