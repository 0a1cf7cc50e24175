"""SPECs with the prefix of a library: ``library:name``, which a plugin builds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, final


class Loadable(Protocol):
    """Something registered, which is loaded when it is needed."""

    def load(self) -> Any:
        """Returns the thing itself."""


@final
@dataclass(frozen=True)
class NamedNetwork:
    """Builds one network of a library; equal where library and name are.

    Attributes:
        build: Called with the name and keyword arguments.
        name: As the library has it.
    """

    build: Callable[..., Any]
    name: str

    def __call__(self, **arguments: Any) -> Any:
        """Returns a fresh module."""
        return self.build(self.name, **arguments)


def named_in_library(spec: str, libraries: Mapping[str, Loadable]) -> NamedNetwork | None:
    """Returns what builds the network that a SPEC names in a library; None where it has no library's prefix.

    Args:
        spec: The SPEC; a name in a library may hold colons.
        libraries: By prefix.

    Example:
        >>> from types import SimpleNamespace
        >>> found = named_in_library("mine:net?width=3", {"mine": SimpleNamespace(load=lambda: str.upper)})
        >>> found.name, found()
        ('net', 'NET')
    """
    prefix, colon, name = spec.partition("?")[0].partition(":")
    return NamedNetwork(libraries[prefix].load(), name) if colon and prefix in libraries else None
