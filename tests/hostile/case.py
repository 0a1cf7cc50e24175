"""One hostile input, and the commands that read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mergekit_ot import save_checkpoint

ARCH = "torch.nn:Linear?in_features=3&out_features=2"


@dataclass(frozen=True)
class Case:
    """A kind of hostile input.

    Attributes:
        name: What is wrong.
        file: The file that is read.
        make: Writes it into a folder.
        says: What the message must hold besides the name of the file: the key, the limit.
        command: The command line; ``FILE`` stands for the file, and ``GOOD`` for a checkpoint that is fine.
    """

    name: str
    file: str
    make: Callable[[Path], object]
    says: tuple[str, ...]
    command: tuple[str, ...]


def checkpoint(name: str, make: Callable[[Path], object], *says: str, end: str = ".pt", arch: bool = True) -> Case:
    """Returns a case of a checkpoint that is looked at."""
    command = ("inspect", "FILE", "--arch", ARCH) if arch else ("inspect", "FILE")
    return Case(name, f"bad{end}", make, says, command)


def raw(content: bytes | Callable[[], bytes]) -> Callable[[Path], object]:
    """Returns what writes bytes; those that are many are made when they are written."""
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content())


def linear() -> dict[str, torch.Tensor]:
    """Returns a state of the architecture of the cases."""
    return {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


def write_good(path: Path) -> None:
    """Writes a checkpoint with which nothing is wrong."""
    state = {"fc1.weight": torch.ones(2, 3), "fc1.bias": torch.ones(2)}
    save_checkpoint(state, path, architecture="mlp", arguments={"sizes": [3, 2]}, input_shape=(3,))
