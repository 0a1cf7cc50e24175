"""What a checkpoint came in: a state that belongs to it is written the same way, so that whoever read it reads this."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

# A place with one of these at its end is a file, whatever the sources are.
FILE_SUFFIXES = (
    ".pt",
    ".pth",
    ".pt2",
    ".bin",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".tar",
    ".safetensors",
    ".npz",
    ".npy",
    ".h5",
)


class AbstractForm(abc.ABC):
    """How the file or folder of a checkpoint is built around its tensors, and how another state is put into it.

    Example:
        A file that holds the weights under a key of its own:

        >>> import tempfile, torch
        >>> class Keyed(AbstractForm):
        ...     name = "keyed"
        ...
        ...     def write(self, path, state, metadata):
        ...         torch.save({"weights": dict(state)}, path)
        >>> path = Path(tempfile.mkdtemp()) / "net.pt"
        >>> Keyed().write(path, {"bias": torch.zeros(2)}, {})
        >>> torch.load(path)
        {'weights': {'bias': tensor([0., 0.])}}
    """

    # What it is called in messages and by who asks for it, such as "state-dict".
    name: str = ""
    # Whether it is a folder of files.
    is_folder: bool = False

    @abc.abstractmethod
    def write(self, path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Writes a state.

        Args:
            path: A place where nothing is yet, or an empty folder; it is renamed into its own place afterwards.
            state: Name → tensor, under the names that the checkpoint's `state` has.
            metadata: Plain data on what the state is and how it was made, for forms that have room for it.

        Raises:
            CheckpointError: The state does not go into this form.
        """

    def has_room(self, path: Path) -> bool:
        """Returns whether what it writes there holds the metadata; else they go into a file beside it.

        Args:
            path: Where it writes, or will.
        """
        return True

    def suits(self, path: Path) -> bool:
        """Returns whether a file of that name is of this form; else a format that goes by the name is asked first."""
        return False

    def sentences(self) -> list[str]:
        """Returns what it keeps of the checkpoint besides the weights, and what it leaves out."""
        return []


def names_folder(place: str) -> bool:
    """Returns whether the name of an output says that it is a folder: by its end, or because a folder is there.

    Example:
        >>> [names_folder(name) for name in ("merged/", "merged", "fused.pt")]
        [True, False, False]
    """
    return place.endswith(("/", "\\")) or (Path(place).is_dir() and not is_file_name(Path(place)))


def is_file_name(path: Path) -> bool:
    """Returns whether a path ends as files do: then a folder of sources makes no folder of it."""
    return path.suffix.lower() in FILE_SUFFIXES


def goes_into_folder(path: Path, form: AbstractForm | None) -> bool:
    """Returns whether a state that is written to `path` in a form becomes a folder of files."""
    return form is not None and form.is_folder and not is_file_name(path)
