"""Walks a captured program once and writes a label on every axis of every value."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.node import map_arg

from mergekit_ot.graph.algebra import AxisAlgebra
from mergekit_ot.graph.expressions import Atom, Expression, PinReason, Replicated, atoms_of, resolve, size_of
from mergekit_ot.graph.rule import Labels, NodeRule, OperationView, RuleError, Value

# A constant larger than this is not searched for repetition along an axis.
_LARGE_CONSTANT = 4_000_000

_RULE_HINT = "Teach it with a rule: docs/writing-plugins.md, 'mergeot_node_rules'."


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


class Propagator:
    """One walk over one program.

    Args:
        program: The captured program.
        find_rule: Gives the rule for an operation (``aten.linear.default``), or None.
        aliases: Further name of a tied parameter → its first name.
    """

    def __init__(
        self, program: ExportedProgram, find_rule: Callable[[Any], NodeRule | None], aliases: Mapping[str, str]
    ) -> None:
        self.program = program
        self.find_rule = find_rule
        self.aliases = aliases
        self.algebra = AxisAlgebra()
        self.found = Labelled(self.algebra)
        self.environment: dict[fx.Node, Any] = {}
        self.step = 0

    def run(self) -> Labelled:
        """Returns the labels of the whole program."""
        signature = self.program.graph_signature
        inputs = {spec.arg.name: spec for spec in signature.input_specs if hasattr(spec.arg, "name")}
        for node in self.program.graph.nodes:
            self.algebra.reason = reason_of(node)
            if node.op == "placeholder":
                self.environment[node] = self._placeholder(node, inputs.get(node.name))
            elif node.op == "call_function":
                self.environment[node] = self._call(node)
                self.step += 1
            elif node.op == "output":
                self._output(node)
        return self.found

    def _placeholder(self, node: fx.Node, spec: Any) -> Any:
        shape = _shape(node.meta.get("val"))
        if shape is None:
            return None
        if spec is None or spec.kind == InputKind.USER_INPUT:
            return Value(shape, [self.algebra.pinned(size, "model input") for size in shape], is_data=True)
        kind = spec.kind
        if kind == InputKind.PARAMETER or (kind == InputKind.BUFFER and self._is_neuron_buffer(node)):
            name = self.aliases.get(spec.target, spec.target)
            if name not in self.found.parameters:
                self.found.parameters[name] = self._fresh(shape)
                if kind == InputKind.BUFFER:
                    self.found.buffers.add(name)
            places = tuple((name, axis) for axis in range(len(shape)))
            return Value(shape, self.found.parameters[name], frozenset({name}), places)
        tensor = self._constant(spec)
        return Value(shape, self._constant_labels(shape, tensor, f"constant '{spec.target}'"))

    def _fresh(self, shape: tuple[int, ...]) -> Labels:
        """Labels of a parameter: each axis free, and possibly a family over the axes before it."""
        labels: Labels = []
        outer: set[Atom] = set()
        for size in shape:
            atom = self.algebra.atom(size, context=outer)
            labels.append(atom)
            outer = outer | ({atom} if size > 1 else set())
        return labels

    def _is_neuron_buffer(self, node: fx.Node) -> bool:
        users = list(node.users)
        return bool(users) and all(
            (rule := self._rule(user)) is not None and any(_bind(user).get(argument) is node for argument in rule.state)
            for user in users
        )

    def _constant(self, spec: Any) -> Tensor | None:
        for store in (self.program.state_dict, self.program.constants):
            tensor = store.get(spec.target)
            if isinstance(tensor, Tensor):
                return tensor
        return None

    def _constant_labels(self, shape: tuple[int, ...], tensor: Tensor | None, what: str) -> Labels:
        labels: Labels = []
        for axis, size in enumerate(shape):
            known = tensor is not None and not tensor.is_meta and tensor.numel() <= _LARGE_CONSTANT and size > 0
            constant = known and bool((tensor == tensor.narrow(axis, 0, 1)).all())  # type: ignore[union-attr]
            labels.append(Replicated(size) if constant or size == 1 else self.algebra.pinned(size, what))
        return labels

    def _rule(self, node: fx.Node) -> NodeRule | None:
        return self.find_rule(node.target) if node.op == "call_function" else None

    def _call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            parent = self.environment.get(node.args[0])  # type: ignore[arg-type]
            return parent[node.args[1]] if isinstance(parent, list) else None  # type: ignore[index]
        outputs = _shapes(node.meta.get("val"))
        operands = [v for v in (self.environment.get(a) for a in node.all_input_nodes) if v is not None]
        values = [v for item in operands for v in (item if isinstance(item, list) else [item]) if isinstance(v, Value)]
        for value in values:
            for parameter in value.origin:
                self.found.first_use.setdefault(parameter, self.step)
        if outputs is None:
            self._pin_inputs(values, f"{node.target} returns no tensor")
            return None
        labels = self._apply(node, values, outputs)
        results = self._values(node, values, labels, outputs)
        for index, result in enumerate(results):
            self.found.values[
                node.name if not isinstance(node.meta["val"], tuple | list) else f"{node.name}.{index}"
            ] = result.labels
        return results if isinstance(node.meta["val"], tuple | list) else results[0]

    def _apply(self, node: fx.Node, values: list[Value], outputs: list[tuple[int, ...]]) -> list[Labels]:
        rule = self._rule(node)
        before = [[resolve(label) for label in value.labels] for value in values]
        if rule is None:
            if not all(_is_inert(label) for labels in before for label in labels):
                self._note_unknown(node, before)
                self._pin_inputs(values, "no rule for this operation")
            self._settle(values, [], [])
            return [self._inert_labels(values, shape, node) for shape in outputs]
        view = OperationView(str(node.target), self._arguments(node), outputs, self.algebra)
        self.algebra.touched = set()
        labels: list[Labels]
        try:
            if is_mutating(node.target):
                raise RuleError(f"{node.target} writes into its input")
            labels = rule.label(view)
            _check_sizes(labels, outputs, node)
        except Exception as error:
            text = (
                f"{self.algebra.reason.operation} at '{self.algebra.reason.module_path}': {error}. Its axes are pinned."
            )
            self.found.rule_errors.append(text)
            self._pin_inputs(values, f"a rule does not fit: {error}")
            labels = [[self.algebra.pinned(size, "output of a pinned operation") for size in s] for s in outputs]
        labels = self._account(values, labels, view)
        self.found.reads.extend(view.reads)
        self._settle(values, labels, view.mixed)
        bound = _bind(node)
        for argument in sorted(view.seen):
            if isinstance(bound[argument], fx.Node):
                self.found.read_values[bound[argument].name] = None
        if not rule.is_movement:
            for value_labels in before:
                self.found.observed |= {a for label in value_labels for a in atoms_of(resolve(label))}
        node.meta["carried"] = view.carried
        return labels

    def _values(
        self, node: fx.Node, operands: list[Value], labels: list[Labels], outputs: list[tuple[int, ...]]
    ) -> list[Value]:
        is_data = any(value.is_data for value in operands)
        origin = frozenset[str]() if is_data else frozenset[str]().union(*(value.origin for value in operands))
        places: tuple[tuple[str, int] | None, ...] = ()
        carried = node.meta.pop("carried", None)
        if carried is not None and operands and operands[0].places:
            places = tuple(None if axis is None else operands[0].places[axis] for axis in carried)
        return [Value(s, ls, origin, places, is_data) for s, ls in zip(outputs, labels, strict=True)]

    def _settle(self, values: list[Value], outputs: list[Labels], mixed: list[Labels]) -> None:
        self.algebra.settle([*(v.labels for v in values), *outputs, *mixed])

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

    def _inert_labels(self, values: list[Value], shape: tuple[int, ...], node: fx.Node) -> Labels:
        return [Replicated(1) if size == 1 else self.algebra.pinned(size, f"made by {node.target}") for size in shape]

    def _note_unknown(self, node: fx.Node, labels: list[Labels]) -> None:
        lost = sum(a.pin is None and a.size > 1 for ls in labels for label in ls for a in atoms_of(label))
        if str(node.target) not in self.found.unknown and lost:
            reason = reason_of(node)
            self.found.unknown[str(node.target)] = (
                f"No rule for operation {node.target} at '{reason.module_path}' ({reason.source}): "
                f"{lost} axes that could move are pinned there. {_RULE_HINT}"
            )

    def _arguments(self, node: fx.Node) -> dict[str, Any]:
        return {name: map_arg(value, self.environment.get) for name, value in _bind(node).items()}

    def _output(self, node: fx.Node) -> None:
        specs = self.program.graph_signature.output_specs
        results = list(node.args[0]) if isinstance(node.args[0], tuple | list) else [node.args[0]]
        for spec, result in zip(specs, results, strict=False):
            value = self.environment.get(result) if isinstance(result, fx.Node) else None  # type: ignore[arg-type]
            if not isinstance(value, Value):
                continue
            self.algebra.reason = PinReason("", "output", "", "")
            if spec.kind in (OutputKind.BUFFER_MUTATION, getattr(OutputKind, "PARAMETER_MUTATION", None)):
                # What a forward writes back into its own parameter has that parameter's order, no fixed one.
                for one, other in zip(self.found.parameters.get(str(spec.target), []), value.labels, strict=False):
                    self.algebra.unify(one, other)
            elif spec.kind == OutputKind.USER_OUTPUT:
                for label in value.labels:
                    self.algebra.pin(label, "model output")
                    self.found.observed |= atoms_of(label)
        self.algebra.settle([])


def reason_of(node: fx.Node) -> PinReason:
    """Returns where an operation stands: its name, module path and source line."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    source = ""
    for line in (node.meta.get("stack_trace") or "").splitlines():
        if 'File "' in line and "/torch/" not in line:
            file, _, rest = line.split('File "', 1)[1].partition('", line ')
            source = f"{file.rsplit('/', 1)[-1]}:{rest.split(',')[0]}"
    return PinReason("", str(node.target) if node.op == "call_function" else "", path, source)


def is_mutating(target: Any) -> bool:
    """Returns whether an operation writes into one of its inputs."""
    schema = getattr(target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _bind(node: fx.Node) -> dict[str, Any]:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    bound = {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)}
    bound |= dict(node.kwargs)
    for argument in schema.arguments:
        if argument.name not in bound and argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def _is_inert(label: Expression) -> bool:
    return all(atom.pin is not None for atom in atoms_of(label))


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else None


def _shapes(value: Any) -> list[tuple[int, ...]] | None:
    if isinstance(value, Tensor):
        return [tuple(int(size) for size in value.shape)]
    if isinstance(value, tuple | list) and value and all(isinstance(v, Tensor) for v in value):
        return [tuple(int(size) for size in v.shape) for v in value]
    return None


def _check_sizes(labels: list[Labels], outputs: list[tuple[int, ...]], node: fx.Node) -> None:
    sizes = [tuple(size_of(label) for label in ls) for ls in labels]
    if sizes != outputs:
        raise RuleError(f"the rule for {node.target} gives sizes {sizes}, the operation {outputs}")
