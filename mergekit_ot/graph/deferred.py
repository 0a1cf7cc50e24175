"""Fields whose values are made when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final


@final
class Deferred:
    """A value that is made when it is first asked for.

    Args:
        make: Gives it.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make: Callable[[], Any] | None = make
        self._value: Any = None

    def get(self) -> Any:
        """Returns the value."""
        if self._make is not None:
            self._value, self._make = self._make(), None
        return self._value

    def __reduce__(self) -> tuple[Any, ...]:
        """Is copied and sent as the value itself."""
        return _itself, (self.get(),)


def _itself(value: Any) -> Any:
    return value


@final
class _DeferredField:
    """A field that holds a value, or a `Deferred` one; whoever reads it gets the value."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        held = vars(instance)
        if isinstance(held[self._name], Deferred):
            held[self._name] = held[self._name].get()
        return held[self._name]

    def __set__(self, instance: object, value: Any) -> None:
        vars(instance)[self._name] = value


def defer_fields(kind: type, *names: str) -> None:
    """Lets fields of a data class hold deferred values."""
    for name in names:
        setattr(kind, name, _DeferredField(name))
