"""Walks a captured program once and writes a label on every axis of every value."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from mergekit_ot.graph.axes.algebra import AxisAlgebra
from mergekit_ot.graph.axes.expressions import Expression, PinReason, Replicated, atoms_of, resolve, size_of
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
)
from mergekit_ot.graph.placeholders import Labelled, PlaceholderLabels
from mergekit_ot.graph.rules.regions import Region, find_regions
from mergekit_ot.graph.rules.rule import Labels, NodeRule, OperationView, RuleError, Value

_SAME_VALUES = (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.clone.default, torch.ops.aten.detach.default)
# How often the time is looked at: every so many operations.
_BUDGET_STEP = 64

_RULE_HINT = "Teach it with a rule: docs/how-to/unknown-operations.md."
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
        self.found = Labelled(self.algebra)
        self.environment: dict[fx.Node, Any] = {}
        self.placeholders = PlaceholderLabels(program, self.found, self._rule, aliases)
        self.step = 0

    def run(self) -> Labelled:
        """Returns the labels of the whole program.

        Raises:
            TraceLimitError: It takes longer than the budget allows.
        """
        slots = self.program.slots
        ends, inside = find_regions(self.program, self.find_rule)
        for node in self.program.graph.nodes:
            self.algebra.reason = reason_of(node)
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
        return self.found

    def _rule(self, node: fx.Node) -> NodeRule | None:
        return self.find_rule(node.target) if node.op == "call_function" else None

    def _call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            parent = self.environment.get(node.args[0])  # type: ignore[arg-type]
            value = parent[node.args[1]] if isinstance(parent, list) else None  # type: ignore[index]
            if isinstance(value, Value):
                self.found.values[node.name] = value.labels
                return replace(value, name=node.name, is_floating=is_floating(node))
            return None
        if not node.users and not is_mutating(node.target):
            return None  # Nothing reads it: an assertion on shapes or types.
        outputs = shapes_of(node.meta.get("val"))
        values = self._operands(node.all_input_nodes)
        if outputs is None:
            self._pin_inputs(values, f"{node.target} returns no tensor")
            return None
        arguments = {name: map_arg(value, self.environment.get) for name, value in named_arguments(node).items()}
        view = OperationView(
            str(node.target), arguments, [shape for shape in outputs if shape is not None], self.algebra
        )
        rule = self._rule(node)
        if is_mutating(node.target):
            rule = _Writes()
        labels = self._apply(rule, view, values)
        results = self._values(node.name, values, labels, view)
        rest = iter(results)
        every = [None if shape is None else next(rest) for shape in outputs]
        if isinstance(node.meta["val"], tuple | list):
            return every
        self.found.values[node.name] = results[0].labels
        result = replace(results[0], is_floating=is_floating(node))
        if rule is not None and rule.is_movement and len(values) == 1 and result.shape == values[0].shape:
            result.constant = values[0].constant if node.target in _SAME_VALUES else None
        return result

    def _call_module(self, region: Region) -> None:
        """Labels the values that one call of a module hands out, as the module's rule says."""
        self.algebra.reason = replace(reason_of(region.nodes[-1]), operation=region.name, module_path=region.path)
        nodes = [node for node in region.outputs if shape_of(node.meta.get("val")) is not None]
        values = self._operands(region.inputs)
        shapes = [shape for node in nodes if (shape := shape_of(node.meta.get("val"))) is not None]
        view = OperationView(region.name, region.arguments(self.program, self.environment), shapes, self.algebra)
        labels = self._apply(region.rule, view, values)
        for node, value in zip(nodes, self._values(region.nodes[-1].name, values, labels, view), strict=True):
            self.environment[node] = replace(value, name=node.name, is_floating=is_floating(node))
            self.found.values[node.name] = value.labels

    def _operands(self, nodes: list[fx.Node]) -> list[Value]:
        operands = [v for v in (self.environment.get(node) for node in nodes) if v is not None]
        values = [v for item in operands for v in (item if isinstance(item, list) else [item]) if isinstance(v, Value)]
        for value in values:
            for parameter in value.origin:
                self.found.first_use.setdefault(parameter, self.step)
        return values

    def _apply(self, rule: NodeRule | None, view: OperationView, values: list[Value]) -> list[Labels]:
        before = [[resolve(label) for label in value.labels] for value in values]
        if rule is None:
            if not all(_is_inert(label) for labels in before for label in labels):
                self._note_unknown(view.name, before)
                self._pin_inputs(values, "no rule for this operation")
            self._settle(values, [], [])
            return [self._inert_labels(shape, view.name) for shape in view.output_shapes]
        self.algebra.touched = set()
        labels: list[Labels]
        try:
            labels = rule.label(view)
            _check_sizes(labels, view)
        except Exception as error:
            text = (
                f"{self.algebra.reason.operation} at '{self.algebra.reason.module_path}': {error}. Its axes are pinned."
            )
            if any(not _is_inert(label) for labels in before for label in labels):
                self.found.rule_errors.append(text)
            self._pin_inputs(values, f"a rule does not fit: {error}")
            labels = [self._inert_labels(shape, view.name) for shape in view.output_shapes]
        labels = self._account(values, labels, view)
        self.found.reads.extend(view.reads)
        self._settle(values, labels, view.scopes)
        for value in view.seen:
            self.found.read_values[value.name] = None
        if not rule.is_movement:
            for value_labels in before:
                self.found.observed |= {a for label in value_labels for a in atoms_of(resolve(label))}
        return labels

    def _values(self, name: str, operands: list[Value], labels: list[Labels], view: OperationView) -> list[Value]:
        is_data = any(value.is_data for value in operands)
        origin = frozenset[str]() if is_data else frozenset[str]().union(*(value.origin for value in operands))
        places: tuple[tuple[str, int] | None, ...] = ()
        if view.carried is not None and operands and operands[0].places:
            places = tuple(None if axis is None else operands[0].places[axis] for axis in view.carried)
        return [Value(s, ls, origin, places, is_data, name) for s, ls in zip(view.output_shapes, labels, strict=True)]

    def _settle(self, values: list[Value], outputs: list[Labels], scopes: list[Labels]) -> None:
        self.algebra.settle([*(v.labels for v in values), *outputs, *scopes])

    def _account(self, values: list[Value], outputs: list[Labels], view: OperationView) -> list[Labels]:
        """Returns the output labels; all pinned where the rule neither passed on nor mentioned an input's axis."""
        seen = {a for labels in outputs for label in labels for a in atoms_of(label)}
        seen |= {a for atom in self.algebra.touched for a in atoms_of(resolve(atom))}
        labels = [label for value in values for label in value.labels]
        lost = [label for label in labels if any(a.pin is None and a.size > 1 for a in atoms_of(label) - seen)]
        if not lost:
            return outputs
        sizes = [size_of(label) for label in lost]
        self.found.unaccounted.append(
            f"The rule for {view.name} does not account for an axis of {sizes[0]}; all its axes are pinned."
        )
        why = f"the rule for {view.name} does not account for every axis"
        self._pin_inputs(values, why)
        return [[self.algebra.pinned(size, why) for size in shape] for shape in view.output_shapes]

    def _pin_inputs(self, values: list[Value], why: str) -> None:
        for value in values:
            for label in value.labels:
                self.algebra.pin(label, why)

    def _inert_labels(self, shape: tuple[int, ...], name: str) -> Labels:
        return [Replicated(1) if size == 1 else self.algebra.pinned(size, f"made by {name}") for size in shape]

    def _note_unknown(self, name: str, labels: list[Labels]) -> None:
        lost = sum(a.pin is None and a.size > 1 for ls in labels for label in ls for a in atoms_of(label))
        if name not in self.found.unknown and lost:
            reason = self.algebra.reason
            self.found.unknown[name] = (
                f"No rule for operation {name} at '{reason.module_path}' ({reason.source}): "
                f"{lost} axes that could move are pinned there. {_RULE_HINT}"
            )

    def _output(self, node: fx.Node) -> None:
        results = list(node.args[0]) if isinstance(node.args[0], tuple | list) else [node.args[0]]
        for slot, result in zip(self.program.outputs, results, strict=False):
            value = self.environment.get(result) if isinstance(result, fx.Node) else None  # type: ignore[arg-type]
            if not isinstance(value, Value):
                continue
            self.algebra.reason = PinReason("", "output", "", "")
            if slot.kind == MUTATION:
                # What a forward writes back into its own parameter has that parameter's order, no fixed one.
                self._written_back(slot.target, value)
            elif slot.kind == USER_OUTPUT:
                for label in value.labels:
                    self.algebra.pin(label, "model output")
                    self.found.observed |= atoms_of(label)
        self.algebra.settle([])

    def _written_back(self, target: str, value: Value) -> None:
        name = self.aliases.get(target, target)
        for one, other in zip(self.found.parameters.get(name, []), value.labels, strict=False):
            self.algebra.unify(one, other)
        if name not in self.found.parameters and target in self.placeholders.read_buffers:
            for label in value.labels:
                self.algebra.pin(label, f"kept in buffer '{target}', which the next forward reads")


class _Writes(NodeRule):
    """What is left of a write in place: nothing that shares its memory can be followed."""

    is_movement = False
    state = ()

    def label(self, operation: OperationView) -> list[Labels]:
        """Refuses, so that everything it touches is pinned."""
        raise RuleError(f"{operation.name} writes into its input")


def _is_inert(label: Expression) -> bool:
    return all(atom.pin is not None for atom in atoms_of(label))


def _check_sizes(labels: list[Labels], view: OperationView) -> None:
    sizes = [tuple(size_of(label) for label in ls) for ls in labels]
    if sizes != view.output_shapes:
        raise RuleError(f"the rule for {view.name} gives sizes {sizes}, the operation {view.output_shapes}")
