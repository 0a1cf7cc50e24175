"""Architectures of networks with the heads of all models: the arguments that give a last layer its size."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from mergekit_ot.errors import MergeotError
from mergekit_ot.fusion.architecture import on_meta, shapes_of
from mergekit_ot.sources.specs import Architecture


def with_outputs(
    architecture: Architecture, own: int, outputs: int, state: Mapping[str, Tensor]
) -> Architecture | None:
    """Returns an architecture with another number of outputs; None where no argument of it says that number.

    Args:
        architecture: The architecture.
        own: Its outputs.
        outputs: Those that are wanted.
        state: The state that is to fit.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> state = nn.Linear(3, 15).state_dict()
        >>> narrow = Architecture("layer", {"classes": 10}, lambda classes: nn.Linear(3, classes))
        >>> with_outputs(narrow, 10, 15, state).arguments
        {'classes': 15}
    """
    try:
        parameters = inspect.signature(architecture.build).parameters.values()
    except (TypeError, ValueError):
        return None
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
    shapes = {name: tensor.shape for name, tensor in state.items()}
    for name, value in {**defaults, **architecture.arguments}.items():
        for other in _replaced(value, own, outputs):
            wider = replace(architecture, arguments={**architecture.arguments, name: other})
            try:
                found = shapes_of(on_meta(wider))
            except MergeotError:
                continue
            if {key: tensor.shape for key, tensor in found.items()} == shapes:
                return wider
    return None


def _replaced(value: Any, own: int, outputs: int) -> Iterator[Any]:
    """Yields an argument with the number of outputs replaced, where it may hold it."""
    if isinstance(value, int) and not isinstance(value, bool) and value == own:
        yield outputs
    elif isinstance(value, tuple | list) and value and value[-1] == own:
        yield type(value)([*value[:-1], outputs])
    elif isinstance(value, str) and re.search(rf"(?<!\d){own}$", value):
        yield f"{value[: -len(str(own))]}{outputs}"
