"""Folders: of images, whose own folders are classes, or of the `datasets` library."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from mergekit_ot import DataReader, DataRequest
from mergekit_ot.errors import DataError
from mergeot_data.images import IMAGE_OPTIONS, SUFFIXES, image_reader

_STATE, _SPLITS_FILE = "state.json", "dataset_dict.json"
# Folders that hold the parts of a data set, the likelier first.
PARTS = {"train": ("train", "training"), "test": ("test", "testing", "val", "valid", "validation")}
_SHOWN = 5


def folder_reader(request: DataRequest) -> DataReader | None:
    """Returns what reads a folder; None where it holds no data that are known.

    Raises:
        DataError: It holds a script, or its images do not fit together.
    """
    folder = request.path
    if (folder / _STATE).is_file() or (folder / _SPLITS_FILE).is_file():
        from mergeot_data.hub import hub_reader

        return hub_reader(request)
    split = part_of(folder, request)
    files = list(_images(split))
    if files:
        request.check_options(IMAGE_OPTIONS)
        return image_reader(request, *_labelled(split, files))
    scripts = sorted(path.name for path in folder.glob("*.py"))
    if scripts:
        raise DataError(
            f"'{folder}' is loaded by a script ({scripts[0]}), and no code of data is run. Save what it gives with "
            "datasets' save_to_disk, and name that folder; or name code of yours: --data file.py:callable."
        )
    return None


def part_of(folder: Path, request: DataRequest) -> Path:
    """Returns the folder of the part that is asked for, or all where it has none.

    Raises:
        DataError: The part is not there.
    """
    names = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    if not set(names) & set(itertools.chain(*PARTS.values())):
        return folder
    for name in PARTS.get(request.split, (request.split,)):
        if name in names:
            return names[name]
    raise DataError(f"'{folder}' has no {request.split} part: it has {', '.join(sorted(names))}. Add ?split=NAME.")


def _images(folder: Path) -> Iterator[Path]:
    """Yields the images in a folder and one level below, in order of their names."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from (each for each in sorted(path.iterdir()) if _is_image(each))
        elif _is_image(path):
            yield path


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")


def _labelled(folder: Path, files: list[Path]) -> tuple[list[Path], list[int] | None]:
    """Returns images with the numbers of their classes: the folders that they lie in, by name."""
    flat = [path for path in files if path.parent == folder]
    if len(flat) == len(files):
        return files, None
    if flat:
        shown = ", ".join(path.name for path in flat[:_SHOWN])
        raise DataError(
            f"'{folder}' has images beside folders of images ({shown}). Put each into the folder of its class, or all "
            "into one folder where they have no labels."
        )
    # A class without an image has its number all the same.
    classes = {path: number for number, path in enumerate(sorted(path for path in folder.iterdir() if path.is_dir()))}
    return files, [classes[path.parent] for path in files]
