"""Labels of what a captured program starts from: parameters, buffers, constants and inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from mergekit_ot.graph.axes.algebra import AxisAlgebra
from mergekit_ot.graph.axes.expressions import Atom, Expression, Replicated
from mergekit_ot.graph.capture.program import (
    BUFFER,
    INPUT,
    PARAMETER,
    RECORDED,
    CapturedProgram,
    ProgramSlot,
    is_floating,
    named_arguments,
    reason_of,
    shape_of,
)
from mergekit_ot.graph.rules.rule import Labels, NodeRule, Value

# A constant larger than this is not searched for repetition along an axis.
_LARGE_CONSTANT = 4_000_000
# Constants up to this size are kept for rules to look at (an index that picks one head).
_SMALL_CONSTANT = 64
# The arguments of operations that take places of entries.
_PLACES = ("index", "indices")


@dataclass
class Labelled:
    """The outcome of propagation: labels of parameters and values, roles, and what was noticed."""

    algebra: AxisAlgebra
    parameters: dict[str, Labels] = field(default_factory=dict)
    buffers: set[str] = field(default_factory=set)
    values: dict[str, Labels] = field(default_factory=dict)
    reads: list[tuple[str, int | None, Expression]] = field(default_factory=list)
    first_use: dict[str, int] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    rule_errors: list[str] = field(default_factory=list)
    unaccounted: list[str] = field(default_factory=list)
    observed: set[Atom] = field(default_factory=set)
    read_values: dict[str, None] = field(default_factory=dict)
    constants: dict[str, str] = field(default_factory=dict)


class PlaceholderLabels:
    """Labels the placeholders of one program.

    Args:
        program: The captured program.
        labelled: Where parameters and constants are noted; its algebra makes the labels.
        find_rule: Gives the rule of an operation, or None.
        aliases: Further name of a tied parameter → its first name.
    """

    def __init__(
        self,
        program: CapturedProgram,
        labelled: Labelled,
        find_rule: Callable[[fx.Node], NodeRule | None],
        aliases: Mapping[str, str],
    ) -> None:
        self.program, self.labelled, self.algebra = program, labelled, labelled.algebra
        self.find_rule, self.aliases = find_rule, aliases
        self.read_buffers: set[str] = set()
        self.kept = program.kept_buffers

    def label(self, node: fx.Node, slot: ProgramSlot) -> Value | None:
        """Returns the labelled value of a placeholder; None for one that is no tensor."""
        shape = shape_of(node.meta.get("val"))
        if shape is None:
            return None
        if slot.kind == INPUT:
            labels: Labels = [self.algebra.pinned(size, "model input") for size in shape]
            return Value(shape, labels, is_data=True, name=node.name, is_floating=is_floating(node))
        if slot.kind == PARAMETER or (slot.kind == BUFFER and self._has_neurons(node, slot)):
            return self._parameter(node, slot, shape)
        return self._constant(node, slot, shape)

    def _parameter(self, node: fx.Node, slot: ProgramSlot, shape: tuple[int, ...]) -> Value:
        """Returns the value of a tensor with neurons of its own: a parameter, or a buffer with an entry per neuron."""
        name = self.aliases.get(slot.target, slot.target)
        if name not in self.labelled.parameters:
            self.labelled.parameters[name] = self._fresh(shape)
            if slot.kind == BUFFER:
                self.labelled.buffers.add(name)
        places = tuple((name, axis) for axis in range(len(shape)))
        return Value(shape, self.labelled.parameters[name], frozenset({name}), places, name=node.name)

    def _constant(self, node: fx.Node, slot: ProgramSlot, shape: tuple[int, ...]) -> Value:
        """Returns the value of a tensor that has no neurons: its axes are pinned unless it is constant along them.

        Only what no file can change is judged by its values: a buffer of a fresh instance is all ones, that of a
        trained one is not.
        """
        if slot.kind == BUFFER and any(user.op != "output" for user in node.users):
            self.read_buffers.add(slot.target)
        elif node.users:
            self.labelled.constants[slot.target] = reason_of(next(iter(node.users))).module_path
        is_of_a_file = slot.kind == BUFFER and self.program.is_saved(slot.target)
        is_known = slot.kind != RECORDED and not is_of_a_file
        tensor = self.program.tensors.get(slot.target) if is_known else None
        labels = self._constant_labels(shape, tensor, f"constant '{slot.target}'")
        is_small = tensor is not None and not tensor.is_meta and tensor.numel() <= _SMALL_CONSTANT
        return Value(
            shape, labels, name=node.name, is_floating=is_floating(node), constant=tensor if is_small else None
        )

    def _fresh(self, shape: tuple[int, ...]) -> Labels:
        """Labels of a parameter: each axis free, and possibly a family over the axes before it."""
        labels: Labels = []
        outer: set[Atom] = set()
        for size in shape:
            atom = self.algebra.atom(size, context=outer)
            labels.append(atom)
            outer = outer | ({atom} if size > 1 else set())
        return labels

    def _has_neurons(self, node: fx.Node, slot: ProgramSlot) -> bool:
        """Whether the axes of a buffer may be those of neurons: of numbers and masks that stand in the state dict.

        What the forward writes for its next call stays in place, unless it is a statistic that a rule knows. So do
        whole numbers that say places.
        """
        if not self.program.is_saved(slot.target):
            return False
        if self._is_neuron_buffer(node):
            return True
        is_read = any(user.op != "output" for user in node.users)
        return is_read and slot.target not in self.kept and not _says_places(node)

    def _is_neuron_buffer(self, node: fx.Node) -> bool:
        users = [user for user in node.users if user.op != "output"]
        return bool(users) and all(self._is_state_of(user, node) for user in users)

    def _is_state_of(self, user: fx.Node, node: fx.Node) -> bool:
        rule = self.find_rule(user)
        if rule is None:
            return False
        is_named = any(named_arguments(user).get(argument) is node for argument in rule.state)
        return is_named or (rule.is_movement and self._is_neuron_buffer(user))

    def _constant_labels(self, shape: tuple[int, ...], tensor: Tensor | None, what: str) -> Labels:
        labels: Labels = []
        for axis, size in enumerate(shape):
            known = tensor is not None and not tensor.is_meta and tensor.numel() <= _LARGE_CONSTANT and size > 0
            constant = known and bool((tensor == tensor.narrow(axis, 0, 1)).all())  # type: ignore[union-attr]
            labels.append(Replicated(size) if constant or size == 1 else self.algebra.pinned(size, what))
        return labels


def _says_places(node: fx.Node) -> bool:
    """Whether whole numbers are used, after moves and arithmetic, to pick or write entries by their place."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.is_floating_point() or torch.is_complex(value):
        return False
    for user in node.users:
        arguments = named_arguments(user)
        picked = [arguments.get(name) for name in _PLACES]
        if any(node is given or (isinstance(given, list | tuple) and node in given) for given in picked):
            return True
        if _says_places(user):
            return True
    return False
