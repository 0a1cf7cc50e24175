"""Node rules: how the neurons of an operation's inputs become the neurons of its outputs.

A rule is usually one line in an einops-like notation (`EinRule`); where a line cannot say it (reshape, slice …), a
function over an `OperationView` (`FunctionRule`). Rules never see tensors, only labels.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_ot.graph.axes.algebra import AxisAlgebra
    from mergekit_ot.graph.axes.expressions import Expression

Labels = list["Expression"]


class RuleError(Exception):
    """A rule does not fit an operation; its axes are pinned and the reason is kept."""


@dataclass(eq=False)
class Value:
    """A tensor of the traced graph: its shape, one label per axis, and the parameters it comes from.

    `origin` names the parameters that the value is made of, if no model input takes part; `places` says, per axis,
    which axis of which parameter it is, where the value is a parameter or a reordering of its axes. `is_data` tells
    values that depend on a model input; `name` is that of the value in the captured program, and
    `is_floating` tells numbers from indices and masks; `constant` is the value of a small constant.

    Example:
        >>> from mergekit_ot.graph.axes.algebra import AxisAlgebra
        >>> algebra = AxisAlgebra()
        >>> weight = Value((8, 4), [algebra.atom(8), algebra.atom(4)], frozenset({"fc.weight"}))
        >>> [label.size for label in weight.labels], weight.is_data
        ([8, 4], False)
    """

    shape: tuple[int, ...]
    labels: Labels
    origin: frozenset[str] = frozenset()
    places: tuple[tuple[str, int] | None, ...] = ()
    is_data: bool = False
    name: str = ""
    is_floating: bool = True
    constant: Tensor | None = None


@dataclass(eq=False)
class OperationView:
    """One operation as a rule sees it: bound arguments, labels, output shapes.

    Attributes:
        name: Operation with overload, such as ``aten.linear.default``.
        arguments: Arguments by schema name; tensors are `Value` objects.
        output_shapes: Shapes of the tensor outputs.
        algebra: Where labels are unified, split and pinned.
        reads: (parameter, axis or None, expression) that the operation contracts: role IN.
        seen: Operands, data rather than parameters, along which it contracts.
        scopes: Lists of axes among which a family must see what it is indexed by, besides the operands and outputs.
        carried: Per output axis the input axis it is, where the rule only reorders axes.
        unread: Numbers of the outputs that nothing reads: the places of a maximum where only its value is asked for.

    Example:
        A rule that notes what it is shown:

        >>> import torch
        >>> from mergekit_ot import FunctionRule
        >>> from mergekit_ot.testing import check_rule
        >>> shown = []
        >>> def note(operation):
        ...     shown.append((operation.name, operation.shape("self"), operation.axes("self", "dims")))
        ...     return [operation.labels("self")]
        >>> class Turned(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.first, self.last = torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)
        ...     def forward(self, x):
        ...         return self.last(self.first(x).flip(0))
        >>> report = check_rule(FunctionRule(note), Turned, torch.randn(3, 4), operation="aten.flip", groups=1)
        >>> shown[0]
        ('aten.flip.default', (3, 6), [0])
    """

    name: str
    arguments: Mapping[str, Any]
    output_shapes: list[tuple[int, ...]]
    algebra: AxisAlgebra
    reads: list[tuple[str, int | None, Expression]] = field(default_factory=list)
    seen: set[Value] = field(default_factory=set)
    scopes: list[Labels] = field(default_factory=list)
    carried: list[int | None] | None = None
    unread: frozenset[int] = frozenset()

    def argument(self, name: str, default: Any = None) -> Any:
        """Returns an argument, or `default` where it is absent or None."""
        value = self.arguments.get(name)
        return default if value is None else value

    @property
    def tensors(self) -> list[Value]:
        """The arguments that are tensors, in order; those inside of lists are left out."""
        return [value for value in self.arguments.values() if isinstance(value, Value)]

    def value(self, name: str) -> Value:
        """Returns the tensor argument `name`.

        Raises:
            RuleError: There is no such tensor.
        """
        value = self.arguments.get(name)
        if not isinstance(value, Value):
            raise RuleError(f"argument '{name}' of {self.name} is not a tensor")
        return value

    def labels(self, name: str) -> Labels:
        """Returns the labels of tensor argument `name`, one expression per axis."""
        return list(self.value(name).labels)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of tensor argument `name`."""
        return self.value(name).shape

    def axes(self, name: str, key: str, default: Sequence[int] | None = None) -> list[int]:
        """Returns the axes given by argument `key` (one, several or none) as non-negative numbers."""
        rank = len(self.shape(name))
        given = self.argument(key, default)
        if given is None:
            return list(range(rank))
        return [axis % rank for axis in ([given] if isinstance(given, int) else given)]

    def mix(self, name: str, axes: Sequence[int]) -> None:
        """Says that the operation mixes along `axes` of argument `name`: no family may depend on them."""
        labels = self.labels(name)
        for axis in axes:
            self.algebra.touch(labels[axis])
        self.scopes.append([label for axis, label in enumerate(labels) if axis not in axes])

    def loop(self, labels: Sequence[Expression]) -> None:
        """Says over which axes the operation runs, each counted once.

        A family that is summed over may depend only on what stands in the loop once: rows and columns of a Gram
        matrix have the same heads on two axes, and meet each other's dimensions.
        """
        for label in labels:
            self.algebra.touch(label)
        self.scopes.append(list(labels))

    def contract(self, name: str | Value, axis: int, expression: Expression | None = None) -> None:
        """Says that the operation sums over an axis of an argument: a parameter there *reads* neurons (IN).

        Args:
            name: The argument, or one tensor of an argument that is a list.
            axis: Which of its axes.
            expression: The part of the axis that is summed over; all of it where left out.
        """
        value = self.value(name) if isinstance(name, str) else name
        expression = value.labels[axis] if expression is None else expression
        self.algebra.touch(expression)
        if value.is_data:
            self.seen.add(value)
        place = value.places[axis] if value.places else None
        if place is not None:
            self.reads.append((place[0], place[1], expression))
        else:
            self.reads.extend((parameter, None, expression) for parameter in value.origin)


class NodeRule(abc.ABC):
    """How labels pass through one kind of operation.

    Attributes:
        is_movement: Whether the operation only moves or drops entries (so that it observes none).
        state: Arguments that hold per-neuron buffers (running statistics), to be transported like parameters.

    Example:
        >>> import torch
        >>> from mergekit_ot.testing import check_rule
        >>> class Pointwise(NodeRule):
        ...     is_movement, state = False, ()
        ...     def label(self, operation):
        ...         return [operation.labels("self")]
        >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Hardswish(), torch.nn.Linear(6, 2))
        >>> check_rule(Pointwise(), make, torch.randn(3, 4), operation="aten.hardswish", groups=1).preserved
        True
    """

    is_movement: bool
    state: tuple[str, ...]

    @abc.abstractmethod
    def label(self, operation: OperationView) -> list[Labels]:
        """Returns the labels of each tensor output.

        Raises:
            RuleError: The rule does not fit; the axes are then pinned.
        """


@dataclass(frozen=True)
class FunctionRule(NodeRule):
    """A rule written as a function that returns the labels of each output.

    Example:
        A running product along an axis depends on its order, and passes the others:

        >>> import torch
        >>> from mergekit_ot.testing import check_rule
        >>> def running(operation):
        ...     labels = operation.labels("self")
        ...     operation.algebra.pin(labels[operation.axes("self", "dim")[0]], "multiplied in order")
        ...     return [labels]
        >>> class Running(torch.nn.Module):
        ...     def __init__(self, axis):
        ...         super().__init__()
        ...         self.first, self.last, self.axis = torch.nn.Linear(4, 6), torch.nn.Linear(6, 2), axis
        ...     def forward(self, x):
        ...         return self.last(self.first(x).cumprod(self.axis))
        >>> def free(axis, groups):
        ...     inputs = torch.randn(3, 4)
        ...     report = check_rule(
        ...         FunctionRule(running), lambda: Running(axis), inputs, operation="aten.cumprod", groups=groups
        ...     )
        ...     return list(report.graph.free_groups)
        >>> free(0, 1), free(1, 0)
        (['first.weight:0'], [])
    """

    function: Callable[[OperationView], list[Labels]]
    is_movement: bool = False
    state: tuple[str, ...] = ()

    def label(self, operation: OperationView) -> list[Labels]:
        """Returns what the function says."""
        return self.function(operation)
