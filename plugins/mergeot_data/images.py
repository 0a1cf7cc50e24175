"""Images: read one batch at a time, brought to the network's size and channels, and normalised as asked."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergekit_ot import DataNeeds, DataReader, DataRequest
from mergekit_ot.errors import DataError, reason_of
from mergeot_data.values import needed, places

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
# Kinds of files that hold pixels and nothing that is run.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
IMAGE_OPTIONS = ("size", "mean", "std", "channels", "batch", "limit")
# As libraries of Hugging Face write down how a network wants its images.
_PREPROCESSOR = "preprocessor_config.json"


def image_reader(request: DataRequest, files: Sequence[Path], labels: Sequence[int] | None) -> DataReader:
    """Returns what reads images.

    Args:
        request: Says how.
        files: The images.
        labels: One per image; None where there are none.
    """
    needed("PIL.Image", f"A folder of images ('{request.path}')")

    def read(needs: DataNeeds) -> Iterator[tuple[Tensor, Tensor | None]]:
        form = ImageForm(request, needs, files[0] if files else None)
        for rows in places(len(files), request):
            pixels = torch.stack([form.tensor(files[row]) for row in rows])
            yield pixels, None if labels is None else torch.tensor([labels[row] for row in rows])

    return read


class ImageForm:
    """How images become inputs of a network.

    Args:
        request: Says ``size=``, ``channels=``, ``mean=`` and ``std=``.
        needs: The network, whose input shape counts where the request does not say.
        first: An image whose size is taken where nothing else is known.

    Raises:
        DataError: What is asked for does not fit.
    """

    def __init__(self, request: DataRequest, needs: DataNeeds, first: Path | bytes | None) -> None:
        self._spec = request.spec
        wanted = _wishes_of(needs)
        shape = needs.shape if needs.shape is not None and len(needs.shape) == 3 else None
        self.channels = self._channels(request, needs, shape)
        self.size = self._size(request, shape, wanted)
        self._is_given = self.size is not None
        if self.size is None and first is not None:
            self.size = opened(first, self._spec).size[::-1]
            needs.notify(
                f"Images of '{request.spec}' are taken at {self.size[0]}×{self.size[1]}, the size of the first: "
                "add ?size=32 for another."
            )
        self._mean, self._std = (self._scale(request, key, wanted.get(f"image_{key}")) for key in ("mean", "std"))
        if "mean" not in request.options and self._mean is not None:
            needs.notify(f"Images of '{request.spec}' are normalised as {_PREPROCESSOR} says.")

    def tensor(self, image: Path | bytes) -> Float[Tensor, "channels height width"]:
        """Returns one image, its shorter side scaled to the size and its middle cut out.

        Raises:
            DataError: It is damaged, or no image.
        """
        found = opened(image, self._spec)
        found = found.convert("L" if self.channels == 1 else "RGB")
        if self.size is not None and found.size != self.size[::-1]:
            if not self._is_given:
                name = image.name if isinstance(image, Path) else "an image"
                raise DataError(
                    f"Images of '{self._spec}' differ in size ('{name}' is {found.size[1]}×{found.size[0]}, the first "
                    f"{self.size[0]}×{self.size[1]}). Say which to bring them to: ?size={self.size[0]}."
                )
            operations = needed("PIL.ImageOps", "Resizing images")
            found = operations.fit(found, self.size[::-1], method=needed("PIL.Image", "Resizing").Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(found, dtype=np.float32) / 255)
        pixels = pixels[None] if self.channels == 1 else pixels.permute(2, 0, 1)
        if self._mean is not None:
            pixels = pixels - self._mean
        return (pixels if self._std is None else pixels / self._std).contiguous()

    def _channels(self, request: DataRequest, needs: DataNeeds, shape: tuple[int, ...] | None) -> int:
        layers = () if needs.network is None else needs.network.modules()
        first = next((layer.in_channels for layer in layers if isinstance(layer, nn.Conv2d)), None)
        channels = request.options.get("channels", shape[0] if shape is not None else first or 3)
        if channels not in (1, 3):
            raise DataError(
                f"The network takes images of {channels} channels, and images have 1 (grey) or 3 (colours). Say "
                "?channels=1 or ?channels=3, or read them with code of yours: --data file.py:callable."
            )
        return channels

    def _size(
        self, request: DataRequest, shape: tuple[int, ...] | None, wanted: dict[str, Any]
    ) -> tuple[int, int] | None:
        asked = request.options.get("size")
        if asked is None:
            if shape is not None:
                return shape[1], shape[2]
            asked = wanted.get("size")
        if asked is None:
            return None
        sides = asked if isinstance(asked, tuple) else (asked, asked)
        if len(sides) != 2 or not all(isinstance(side, int) and 0 < side <= 8192 for side in sides):
            raise DataError(f"size={asked} of '{self._spec}': it is one side, or height,width, of 1 to 8192 pixels.")
        return sides[0], sides[1]

    def _scale(self, request: DataRequest, key: str, wanted: Any) -> Tensor | None:
        given = request.options.get(key, wanted)
        if given is None:
            return None
        numbers = given if isinstance(given, tuple) else (given,)
        is_fitting = len(numbers) in (1, self.channels) and all(isinstance(each, int | float) for each in numbers)
        if not is_fitting or (key == "std" and 0 in numbers):
            raise DataError(
                f"{key}={given} of '{self._spec}': give one number, or one per channel ({self.channels}) with commas"
                f"{', none of them zero' if key == 'std' else ''}."
            )
        return torch.tensor(numbers, dtype=torch.float32).reshape(-1, 1, 1)


def opened(image: Path | bytes, spec: str) -> Any:
    """Returns an image of a kind that holds pixels alone.

    Raises:
        DataError: It is damaged, of another kind, or unfolds to more than a picture has.
    """
    library = needed("PIL.Image", "Reading images")
    try:
        with warnings.catch_warnings():
            # A small file may unfold to a picture that fills the memory.
            warnings.simplefilter("error", library.DecompressionBombWarning)
            found = library.open(image if isinstance(image, Path) else io.BytesIO(image), formats=_FORMATS)
            found.load()
            return found
    except (
        OSError,
        ValueError,
        SyntaxError,
        library.DecompressionBombWarning,
        library.DecompressionBombError,
    ) as error:
        name = f"'{image}'" if isinstance(image, Path) else f"An image of '{spec}'"
        raise DataError(
            f"{name} cannot be read as an image ({reason_of(error)}). Leave it out, or save it anew."
        ) from error


def _wishes_of(needs: DataNeeds) -> dict[str, Any]:
    """Returns how the network of a folder wants its images, as far as a file beside it says so."""
    path = next((folder / _PREPROCESSOR for folder in needs.folders if (folder / _PREPROCESSOR).is_file()), None)
    if path is None or path.stat().st_size > 1 << 16:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or not content.get("do_normalize", True):
        return {}
    size = content.get("size")
    if isinstance(size, dict):
        size = (size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge")))
    scales = {key: content.get(key) for key in ("image_mean", "image_std")}
    wanted = {key: tuple(value) for key, value in scales.items() if isinstance(value, list)}
    return {**wanted, **({} if size is None else {"size": size})}
