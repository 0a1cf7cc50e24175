"""Fresh instances of an architecture, without memory for their tensors where that is possible."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn


def shapes_of(make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Returns the state dict of a fresh instance, without memory for its tensors where that is possible."""
    return {name: value for name, value in on_meta(make).state_dict().items() if isinstance(value, Tensor)}


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """Returns a fresh instance on the meta device, or a real one where the constructor needs real tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                return make()
        except Exception as failure:
            # What is too large without memory is too large with it, and would be filled until there is none left.
            if "overflow" in str(failure).lower() or "too large" in str(failure).lower():
                raise
            return make()
