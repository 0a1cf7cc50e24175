"""Files whose tensors are averaged as they stand: their names and shapes are all that need be known of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergekit_ot.errors import ArchitectureError
from mergekit_ot.sources.specs import Architecture
from mergekit_ot.storage.limits import shortened

if TYPE_CHECKING:
    from mergekit_ot.storage.record import Checkpoint

_NAMED = 5
# A counter that older files lack, and that takes no part in a function.
_COUNTER = "num_batches_tracked"


class Holder(nn.Module):
    """Has tensors under given names, and computes nothing: its outputs are they, so that every one keeps its order.

    Args:
        tensors: Name → shape and type. What holds no whole numbers or booleans is a parameter.
    """

    def __init__(self, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        super().__init__()
        for name, (shape, dtype) in tensors.items():
            *path, last = name.split(".")
            place: nn.Module = self
            for part in path:
                if part not in dict(place.named_children()):
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            values = torch.zeros(shape, dtype=dtype)
            if dtype.is_floating_point or dtype.is_complex:
                place.register_parameter(last, nn.Parameter(values))
            else:
                # What is true or false might decide what a forward does, which is looked for; here it decides nothing.
                place.register_buffer(last, values.to(torch.uint8) if dtype is torch.bool else values)

    def forward(self, values: Tensor) -> tuple[Tensor, ...]:
        """Returns its input, and its parameters with another sign: what is handed out as it is counts as unread."""
        return values, *(-parameter for parameter in self.parameters())


def holder_of(checkpoint: Checkpoint) -> Architecture:
    """Returns an architecture that has the tensors of a file and no function.

    Raises:
        ArchitectureError: No module can have such names: a tensor is called like what holds others.
    """
    store = checkpoint.state
    tensors = {name: (tuple(store.shape(name)), store.dtype(name)) for name in store.names}
    try:
        with torch.device("meta"):
            Holder(tensors)
    except KeyError as error:
        raise ArchitectureError(
            f"'{checkpoint.path}' has tensors that no module could hold under their names: {error.args[0]}. Rename "
            "them, or pass --arch SPEC."
        ) from error
    make = functools.partial(Holder, tensors)
    return Architecture("tensors as they stand", {}, make, unknown="the whole function")


def check_alike(checkpoints: Sequence[Checkpoint]) -> None:
    """Checks that files have the same names and shapes.

    Raises:
        ArchitectureError: Says where the first difference is.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        here, there = first.state, other.state
        both = [name for name in (*here.names, *there.names) if not name.endswith(_COUNTER)]
        lone = [name for name in both if name not in here or name not in there]
        if lone:
            raise _unlike(f"these are in only one of the two: {', '.join(map(shortened, lone[:_NAMED]))}", first, other)
        for name in here.names:
            if name in there and here.shape(name) != there.shape(name):
                shapes = " and ".join(str(tuple(store.shape(name))) for store in (here, there))
                raise _unlike(f"'{name}' is {shapes}", first, other)


def _unlike(how: str, first: Checkpoint, other: Checkpoint) -> Any:
    return ArchitectureError(
        f"'{first.path}' and '{other.path}' say no architecture and differ in names or shapes ({how}), so they cannot "
        "be averaged as they stand. Pass --arch SPEC and a solver that aligns neurons, such as wb."
    )
