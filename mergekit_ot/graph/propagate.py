"""Walks a captured program once and writes a label on every axis of every value."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from mergekit_ot.graph.axes.algebra import AxisAlgebra
from mergekit_ot.graph.axes.expressions import (
    Replicated,
    atoms_of,
    is_inert,
    movable,
    resolve,
    size_of,
    standing_for,
)
from mergekit_ot.graph.axes.reasons import PinReason
from mergekit_ot.graph.capture.front_end import TraceBudget
from mergekit_ot.graph.capture.program import (
    MUTATION,
    USER_OUTPUT,
    CapturedProgram,
    is_floating,
    is_mutating,
    named_arguments,
    reason_of,
    shape_of,
    shapes_of,
    unread_outputs,
)
from mergekit_ot.graph.placeholders import Labelled, PlaceholderLabels
from mergekit_ot.graph.rules.regions import Region, find_regions
from mergekit_ot.graph.rules.rule import Labels, NodeRule, OperationView, RuleError, Value

_SAME_VALUES = (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.clone.default, torch.ops.aten.detach.default)
# How often the time is looked at: every so many operations.
_BUDGET_STEP = 64

# What a buffer is made into a table of waves by: its entries are frequencies, which no network has in another order.
_WAVES = ("aten.sin.", "aten.cos.")

_RULE_HINT = "Teach it with a rule: see 'mergeot docs unknown-operations'."
_Shapes = list[tuple[int, ...] | None]


class Propagator:
    """One walk over one program.

    Args:
        program: The captured program.
        find_rule: Gives the rule for an operation (``aten.linear.default``), or None.
        aliases: Further name of a tied parameter → its first name.
        budget: Stops the walk where it takes too long.
    """

    def __init__(
        self,
        program: CapturedProgram,
        find_rule: Callable[[Any], NodeRule | None],
        aliases: Mapping[str, str],
        budget: TraceBudget,
    ) -> None:
        self.program = program
        self.find_rule = find_rule
        self.aliases = aliases
        self.budget = budget
        self.algebra = AxisAlgebra()
        self.labelled = Labelled(self.algebra)
        self.environment: dict[fx.Node, Any] = {}
        self.placeholders = PlaceholderLabels(program, self.labelled, self._rule, aliases)
        self.step = 0

    def run(self) -> Labelled:
        """Returns the labels of the whole program.

        Raises:
            TraceLimitError: It takes longer than the budget allows.
        """
        slots = self.program.slots
        ends, inside = find_regions(self.program, self.find_rule)
        for node in self.program.graph.nodes:
            self.algebra.stand_at(reason_of(node))
            if node.op == "placeholder":
                self.environment[node] = self.placeholders.label(node, slots[node])
            elif node in ends:
                self._call_module(ends[node])
                self.step += 1
            elif node.op == "call_function" and node not in inside:
                self.environment[node] = self._call(node)
                self.step += 1
            elif node.op == "output":
                self._output(node)
            if self.step % _BUDGET_STEP == 0:
                self.budget.check("while neuron groups were looked for")
        return self.labelled

    def _rule(self, node: fx.Node) -> NodeRule | None:
        return self.find_rule(node.target) if node.op == "call_function" else None

    def _call(self, node: fx.Node) -> Any:
        """Returns the labelled value of an operation, a list of them where it has several outputs."""
        if node.target is operator.getitem:
            return self._item(node)
        if not node.users and not is_mutating(node.target):
            return None  # Nothing reads it: an assertion on shapes or types.
        outputs = shapes_of(node.meta.get("val"))
        values = self._operands(node.all_input_nodes)
        if outputs is None:
            self._pin_inputs(values, f"{node.target} returns no tensor")
            return None
        return self._call_rule(node, outputs, values)

    def _item(self, node: fx.Node) -> Value | None:
        """Returns one output of an operation that has several."""
        parent = self.environment.get(node.args[0])  # type: ignore[arg-type]
        value = parent[node.args[1]] if isinstance(parent, list) else None  # type: ignore[index]
        if not isinstance(value, Value):
            return None
        self.labelled.values[node.name] = value.labels
        return replace(value, name=node.name, is_floating=is_floating(node))

    def _call_rule(self, node: fx.Node, outputs: _Shapes, values: list[Value]) -> Any:
        view = self._view(node, outputs)
        rule = _Writes() if is_mutating(node.target) else self._rule(node)
        labels = self._apply(rule, view, values)
        results = self._values(node.name, values, labels, view)
        if isinstance(node.meta["val"], tuple | list):
            rest = iter(results)
            return [None if shape is None else next(rest) for shape in outputs]
        self.labelled.values[node.name] = results[0].labels
        result = replace(results[0], is_floating=is_floating(node))
        is_copy = node.target in _SAME_VALUES and len(values) == 1
        if is_copy and rule is not None and rule.is_movement:
            result.constant = values[0].constant
        return result

    def _view(self, node: fx.Node, outputs: _Shapes) -> OperationView:
        arguments = {name: map_arg(value, self.environment.get) for name, value in named_arguments(node).items()}
        shapes = [shape for shape in outputs if shape is not None]
        return OperationView(str(node.target), arguments, shapes, self.algebra, unread=unread_outputs(node))

    def _call_module(self, region: Region) -> None:
        """Labels the values that one call of a module hands out, as the module's rule says."""
        self.algebra.stand_at(replace(reason_of(region.nodes[-1]), operation=region.name, module_path=region.path))
        shape_by_node = {node: shape_of(node.meta.get("val")) for node in region.outputs}
        nodes = [node for node, shape in shape_by_node.items() if shape is not None]
        shapes = [shape for shape in shape_by_node.values() if shape is not None]
        values = self._operands(region.inputs)
        view = OperationView(region.name, region.arguments(self.program, self.environment), shapes, self.algebra)
        labels = self._apply(region.rule, view, values)
        for node, value in zip(nodes, self._values(region.nodes[-1].name, values, labels, view), strict=True):
            self.environment[node] = replace(value, name=node.name, is_floating=is_floating(node))
            self.labelled.values[node.name] = value.labels

    def _operands(self, nodes: list[fx.Node]) -> list[Value]:
        values: list[Value] = []
        for node in nodes:
            held = self.environment.get(node)
            values += [value for value in (held if isinstance(held, list) else [held]) if isinstance(value, Value)]
        for value in values:
            for parameter in value.origin:
                self.labelled.first_use.setdefault(parameter, self.step)
        return values

    def _apply(self, rule: NodeRule | None, view: OperationView, values: list[Value]) -> list[Labels]:
        """Returns the labels of the outputs as the rule says, after all that it demands of the inputs was done."""
        before = [resolve(label) for label in _labels_of(values)]
        if rule is None:
            if not all(map(is_inert, before)):
                self._note_unknown(view.name, before)
                self._pin_inputs(values, "no rule for this operation")
            self._settle(values, [], [])
            return self._inert_outputs(view)
        self.algebra.forget_touched()
        try:
            labels = rule.label(view)
            _check_sizes(labels, view)
        except Exception as error:
            self._note_error(error, before)
            self._pin_inputs(values, f"a rule does not fit: {error}")
            labels = self._inert_outputs(view)
        if view.name.startswith(_WAVES):
            self._pin_frequencies(before)
        labels = self._account(values, labels, view)
        self.labelled.reads.extend(view.reads)
        self._settle(values, labels, view.scopes)
        for value in view.seen:
            self.labelled.read_values[value.name] = None
        if not rule.is_movement:
            self.labelled.observed |= standing_for(before)
        return labels

    def _values(self, name: str, operands: list[Value], labels: list[Labels], view: OperationView) -> list[Value]:
        is_data = any(value.is_data for value in operands)
        origin = frozenset[str]() if is_data else frozenset[str]().union(*(value.origin for value in operands))
        places: tuple[tuple[str, int] | None, ...] = ()
        if view.carried is not None and operands and operands[0].places:
            places = tuple(None if axis is None else operands[0].places[axis] for axis in view.carried)
        return [
            Value(shape, axes, origin, places, is_data, name)
            for shape, axes in zip(view.output_shapes, labels, strict=True)
        ]

    def _settle(self, values: list[Value], outputs: list[Labels], scopes: list[Labels]) -> None:
        self.algebra.settle([*(v.labels for v in values), *outputs, *scopes])

    def _account(self, values: list[Value], outputs: list[Labels], view: OperationView) -> list[Labels]:
        """Returns the output labels; all pinned where the rule neither passed on nor mentioned an input's axis."""
        seen = standing_for(self.algebra.touched).union(*map(standing_for, outputs))
        lost = next((label for label in _labels_of(values) if movable(label) - seen), None)
        if lost is None:
            return outputs
        self.labelled.unaccounted.append(
            f"The rule for {view.name} does not account for an axis of {size_of(lost)}; all its axes are pinned."
        )
        why = f"the rule for {view.name} does not account for every axis"
        self._pin_inputs(values, why)
        outputs = []
        for shape in view.output_shapes:
            outputs.append([self.algebra.pinned(size, why) for size in shape])
        return outputs

    def _pin_frequencies(self, labels: Labels) -> None:
        """Pins what only buffers hold where it becomes the frequencies of waves (rotary and sinusoidal tables)."""
        held = (self.labelled.parameters[name] for name in self.labelled.buffers)
        tables = standing_for(itertools.chain.from_iterable(held))
        if not tables:
            return
        learned = [axes for name, axes in self.labelled.parameters.items() if name not in self.labelled.buffers]
        owned = standing_for(itertools.chain.from_iterable(learned))
        for label in labels:
            if movable(label) & tables - owned:
                self.algebra.pin(label, "frequencies that a buffer holds")

    def _pin_inputs(self, values: list[Value], why: str) -> None:
        for label in _labels_of(values):
            self.algebra.pin(label, why)

    def _inert_outputs(self, view: OperationView) -> list[Labels]:
        """Returns labels of outputs that nothing may reorder."""
        outputs: list[Labels] = []
        for shape in view.output_shapes:
            why = f"made by {view.name}"
            outputs.append([Replicated(1) if size == 1 else self.algebra.pinned(size, why) for size in shape])
        return outputs

    def _note_error(self, error: Exception, labels: Labels) -> None:
        reason = self.algebra.reason
        if not all(map(is_inert, labels)):
            self.labelled.rule_errors.append(
                f"{reason.operation} at '{reason.module_path}': {error}. Its axes are pinned."
            )

    def _note_unknown(self, name: str, labels: Labels) -> None:
        lost = sum(len(movable(label)) for label in labels)
        if name not in self.labelled.unknown and lost:
            reason = self.algebra.reason
            self.labelled.unknown[name] = (
                f"No rule for operation {name} at '{reason.module_path}' ({reason.source}): "
                f"{lost} axes that could move are pinned there. {_RULE_HINT}"
            )

    def _output(self, node: fx.Node) -> None:
        results = list(node.args[0]) if isinstance(node.args[0], tuple | list) else [node.args[0]]
        for slot, result in zip(self.program.outputs, results, strict=False):
            value = self.environment.get(result) if isinstance(result, fx.Node) else None  # type: ignore[arg-type]
            if not isinstance(value, Value):
                continue
            self.algebra.stand_at(PinReason("", "output", "", ""))
            if slot.kind == MUTATION:
                # What a forward writes back into its own parameter has that parameter's order, no fixed one.
                self._written_back(slot.target, value)
            elif slot.kind == USER_OUTPUT:
                for label in value.labels:
                    self.algebra.pin(label, "model output")
                    self.labelled.observed |= atoms_of(label)
        self.algebra.settle([])

    def _written_back(self, target: str, value: Value) -> None:
        name = self.aliases.get(target, target)
        for kept, written in zip(self.labelled.parameters.get(name, []), value.labels, strict=False):
            self.algebra.unify(kept, written)
        if name not in self.labelled.parameters and target in self.placeholders.read_buffers:
            for label in value.labels:
                self.algebra.pin(label, f"kept in buffer '{target}', which the next forward reads")


class _Writes(NodeRule):
    """What is left of a write in place: nothing that shares its memory can be followed."""

    is_movement = False
    state = ()

    def label(self, operation: OperationView) -> list[Labels]:
        """Refuses, so that everything it touches is pinned."""
        raise RuleError(f"{operation.name} writes into its input")


def _labels_of(values: list[Value]) -> Labels:
    return list(itertools.chain.from_iterable(value.labels for value in values))


def _check_sizes(labels: list[Labels], view: OperationView) -> None:
    sizes = [tuple(map(size_of, axes)) for axes in labels]
    if sizes != view.output_shapes:
        raise RuleError(f"the rule for {view.name} gives sizes {sizes}, the operation {view.output_shapes}")
