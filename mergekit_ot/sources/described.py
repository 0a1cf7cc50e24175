"""Inputs that the user describes in words, one ``--input`` each: ``x=1,28,28``, ``t=int:1000``, ``mask=bool:16``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ot.errors import ArchitectureError
from mergekit_ot.scoring.batches import ForwardArguments
from mergekit_ot.storage.limits import INPUT_NUMBERS, shortened

_SAMPLES = 2
_KINDS = ("float", "int", "bool")
_FORMS = (
    "An input is NAME=SHAPE (x=1,28,28), NAME=int:BOUND (one whole number below it), NAME=int:BOUND:SHAPE "
    "(tokens=int:5000:16), NAME=float or NAME=bool:SHAPE; without the batch axis, and NAME= may be left out."
)


@dataclass(frozen=True)
class DescribedInput:
    """What one input is.

    Attributes:
        name: Of forward's argument; empty where the place says it.
        kind: ``float``, ``int`` or ``bool``.
        bound: What whole numbers are below.
        shape: Of one sample.
    """

    name: str
    kind: str
    bound: int
    shape: tuple[int, ...]

    def draw(self, generator: torch.Generator) -> Tensor:
        """Returns a few samples."""
        size = (_SAMPLES, *self.shape)
        if self.kind == "float":
            return torch.randn(size, generator=generator)
        whole = torch.randint(self.bound, size, generator=generator)
        return whole.bool() if self.kind == "bool" else whole


def read_input(text: str) -> DescribedInput:
    """Reads what a user says of one input.

    Raises:
        ArchitectureError: It is none of the forms, or asks for too much.

    Example:
        >>> read_input("x=1,8,8")
        DescribedInput(name='x', kind='float', bound=2, shape=(1, 8, 8))
        >>> read_input("t=int:1000").bound, read_input("int:50:16").shape
        (1000, (16,))
    """
    before, equals, after = text.partition("=")
    name, body = (before.strip(), after) if equals else ("", before)
    parts = [part.strip() for part in body.split(":")]
    kind = parts.pop(0) if parts[0] in _KINDS else "float" if len(parts) == 1 else ""
    bound = parts.pop(0) if kind == "int" and parts else "2"
    if not kind or (equals and not name) or len(parts) > 1 or not _is_size(bound):
        raise ArchitectureError(f"--input '{shortened(text)}' is not understood. {_FORMS}")
    sizes = parts[0].split(",") if parts else []
    if not all(map(_is_size, sizes)):
        raise ArchitectureError(f"--input '{shortened(text)}': '{shortened(parts[0])}' is no shape. {_FORMS}")
    shape = tuple(map(int, sizes))
    INPUT_NUMBERS.check(math.prod(shape), f"One input of --input {shortened(text, 80)} has", ArchitectureError)
    return DescribedInput(name, kind, int(bound), shape)


def described_inputs(texts: Sequence[str], forward: ForwardArguments) -> tuple[Tensor, ...]:
    """Returns inputs of a network in the order in which forward takes them.

    Args:
        texts: What the user says of each.
        forward: What the network takes.

    Raises:
        ArchitectureError: A name is no argument of forward, stands twice, or one that is needed is missing.

    Example:
        >>> forward = ForwardArguments(("x", "t"), 2)
        >>> [tuple(each.shape) for each in described_inputs(["t=int:1000", "x=1,8,8"], forward)]
        [(2, 1, 8, 8), (2,)]
    """
    read = [read_input(text) for text in texts]
    names = forward.names
    takes = f"forward takes {', '.join(names)}" if names else "forward does not name what it takes"
    placed: dict[int, DescribedInput] = {}
    for place, each in enumerate(read):
        if each.name and each.name not in names:
            raise ArchitectureError(f"--input {each.name}=…: there is no such argument: {takes}. Correct the name.")
        where = names.index(each.name) if each.name else place
        if where in placed:
            raise ArchitectureError(f"--input says twice what '{each.name or where}' is. Leave one out.")
        placed[where] = each
    lacking = [place for place in range(max(*placed, (forward.needed or 1) - 1) + 1) if place not in placed]
    if lacking:
        name = names[lacking[0]] if lacking[0] < len(names) else f"number {lacking[0]}"
        raise ArchitectureError(f"Nothing is said of the input '{name}': {takes}. Add --input {name}=SHAPE.")
    generator = torch.Generator().manual_seed(0)
    return tuple(placed[place].draw(generator) for place in sorted(placed))


def _is_size(text: str) -> bool:
    return text.isdecimal() and len(text) < 19 and int(text) > 0
