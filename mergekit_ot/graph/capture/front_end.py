"""What a front end is: it turns a module into a captured program, within limits of time and size."""

from __future__ import annotations

import abc
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from torch import nn
from torch.overrides import TorchFunctionMode

from mergekit_ot.errors import ArchitectureError

if TYPE_CHECKING:
    from mergekit_ot.graph.capture.program import CapturedProgram

# Names that are no plugin's: the front ends in order, and torch's own.
AUTO = "auto"
EXPORT = "export"


@dataclass(frozen=True)
class TraceLimits:
    """How far tracing may go before it is stopped.

    Attributes:
        seconds: Wall-clock time for capture and propagation together.
        operations: Calls into torch that the module's forward may make while it is captured.

    Example:
        >>> import torch
        >>> from mergekit_ot import trace_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> trace_model(net, torch.randn(2, 4), limits=TraceLimits(operations=1))
        Traceback (most recent call last):
        mergekit_ot...TraceLimitError: Tracing 'Sequential' was stopped at the limit of 1 operations ...
    """

    seconds: float = 300.0
    operations: int = 100_000


class TraceBudget:
    """Counts the time and the operations of one trace against its limits.

    Args:
        limits: The limits.
        name: What is traced, for the message.

    Example:
        >>> import torch
        >>> budget = TraceBudget(TraceLimits(operations=10), "net")
        >>> inputs = torch.ones(2)
        >>> with budget.watching():
        ...     outputs = inputs.exp() + 1
        >>> budget.operations
        2
    """

    def __init__(self, limits: TraceLimits, name: str) -> None:
        self.limits, self.name = limits, name
        self.operations = 0
        self._start = time.monotonic()

    def check(self, what: str) -> None:
        """Stops the trace where a limit is passed.

        Raises:
            TraceLimitError: One is; the message says which and how far it came.
        """
        seconds = time.monotonic() - self._start
        if self.operations <= self.limits.operations and seconds <= self.limits.seconds:
            return
        is_large = self.operations > self.limits.operations
        limit = f"{self.limits.operations} operations" if is_large else f"{self.limits.seconds:g} s"
        flag = "--trace-operations" if is_large else "--trace-seconds"
        raise TraceLimitError(
            f"Tracing '{self.name}' was stopped at the limit of {limit} ({what}; {self.operations} operations in "
            f"{seconds:.0f} s). Loops in forward are unrolled, one operation per step: trace at a smaller input "
            f"(--input-shape, or example_inputs), or raise the limit ({flag}, or limits=TraceLimits(…))."
        )

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Counts every call into torch that is made meanwhile."""
        with _Counter(self):
            yield


class TraceLimitError(ArchitectureError):
    """A trace was stopped because it took too long or grew too large."""


# Reading a shape or a dtype is a call too, and no operation. Nor is what a context manager does on its way out: were
# the limit raised there, the caller would be left without gradients.
_NOT_COUNTED = frozenset({"__get__", "_set_grad_enabled"})


@runtime_checkable
class _Named(Protocol):
    __name__: str


class _Counter(TorchFunctionMode):
    def __init__(self, budget: TraceBudget) -> None:
        super().__init__()
        self.budget = budget

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not (isinstance(func, _Named) and func.__name__ in _NOT_COUNTED):
            self.budget.operations += 1
            self.budget.check("while it was captured")
        return func(*args, **(kwargs or {}))


class AbstractFrontEnd(abc.ABC):
    """One way to capture a module.

    Attributes:
        is_fallback: Whether it is tried by itself where ``torch.export`` cannot capture a module.
        shares_weights: Whether it never writes into a parameter, so that those of the copy that it is given may share
            their memory with the network's own.

    Example:
        >>> import dataclasses, torch
        >>> from types import SimpleNamespace
        >>> from mergekit_ot import ExportFrontEnd, PluginManager, hookimpl, trace_model
        >>> class Compiled(AbstractFrontEnd):
        ...     def capture(self, model, inputs, budget):
        ...         return ExportFrontEnd().capture(model._orig_mod, inputs, budget)
        >>> manager = PluginManager.load()
        >>> hook = hookimpl(lambda: {"compiled": Compiled})
        >>> manager.register(SimpleNamespace(mergeot_front_ends=hook), "mine")
        >>> net = torch.compile(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)))
        >>> list(trace_model(net, torch.randn(2, 4), manager, front_end="compiled").free_groups)
        ['0.weight:0']
    """

    is_fallback: ClassVar[bool] = False
    shares_weights: ClassVar[bool] = False

    @abc.abstractmethod
    def capture(self, model: nn.Module, inputs: tuple[object, ...], budget: TraceBudget) -> CapturedProgram:
        """Returns the captured program of a module that is in evaluation mode and was never run.

        Args:
            model: A copy that the front end may use up.
            inputs: Positional inputs.
            budget: To be watched while the module runs.

        Raises:
            Exception: Whatever stops it; the caller says what and where.
        """
