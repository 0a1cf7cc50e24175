"""The networks of a fusion, whose graphs are found when somebody first asks for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Generic, TypeVar, final, overload

from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.fusion.tracing import TracedModels

Value = TypeVar("Value")


@final
class FusedNetworks:
    """The sources and the target of a fusion.

    Args:
        sources: In the user's order.
        target: The architecture whose sizes the fused model takes.
        trace: Finds their graphs.
    """

    def __init__(
        self, sources: tuple[SourceModel, ...], target: SourceModel, trace: Callable[[], TracedModels]
    ) -> None:
        self.sources, self.target, self._trace = sources, target, trace
        self._traced: TracedModels | None = None

    @property
    def is_traced(self) -> bool:
        """Whether the graphs are known."""
        return self._traced is not None

    @property
    def traced(self) -> TracedModels:
        """The networks with their graphs, which are found if they are not known yet (`trace`)."""
        return self.trace()

    def trace(self) -> TracedModels:
        """Finds the graphs, if they are not known yet, and returns the networks with them.

        Raises:
            MergeotError: One cannot be traced, or they differ by more than neuron counts.
        """
        if self._traced is None:
            self._traced = self._trace()
        return self._traced


@final
class Deferred(Generic[Value]):
    """A value that is worked out when it is first asked for.

    Example:
        >>> deferred = Deferred(lambda: print("asked for") or 3)
        >>> deferred.value, deferred.value
        asked for
        (3, 3)
    """

    def __init__(self, find: Callable[[], Value]) -> None:
        self._find = find

    @functools.cached_property
    def value(self) -> Value:
        """It."""
        return self._find()


class DeferredField(Generic[Value]):
    """A field of a dataclass that is given a value, or a deferred one, and gives the value.

    Args:
        default: The value where none is given; without it one must be.
    """

    def __init__(self, *default: Value) -> None:
        self._default = default

    @overload
    def __get__(self, instance: None, owner: type) -> DeferredField[Value]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> Value: ...

    def __get__(self, instance: object | None, owner: type) -> DeferredField[Value] | Value:
        if instance is None and not self._default:
            raise AttributeError(self._name)  # tells the dataclass that the field has no default
        if instance is None:
            return self._default[0]
        held = instance.__dict__[self._name]
        return held.value if isinstance(held, Deferred) else held

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __set__(self, instance: object, value: Value | Deferred[Value]) -> None:
        instance.__dict__[self._name] = value
