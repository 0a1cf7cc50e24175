"""Language models of `transformers` hand out their key/value cache beside the result, unless they are told not to.

The cache is no output in the sense of a function that must stay: its heads move with the neurons.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class _Caching(Protocol):
    """What a configuration of `transformers` looks like; there is no class to import without that package."""

    use_cache: object


@runtime_checkable
class _Configured(Protocol):
    config: object


def caching_configurations(model: nn.Module) -> list[_Caching]:
    """Returns the configurations, of a model and its parts, that ask for the cache."""
    held = [module.config for module in model.modules() if isinstance(module, _Configured)]
    return [config for config in held if isinstance(config, _Caching) and config.use_cache is True]


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Runs a block in which a model hands out no cache; its configuration may be shared, and is then as it was."""
    configurations = caching_configurations(model)
    for configuration in configurations:
        configuration.use_cache = False
    try:
        yield
    finally:
        for configuration in configurations:
            configuration.use_cache = True
