"""A captured program: a module as a functional graph of aten operations, whichever front end made it."""

from __future__ import annotations

import enum
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from mergekit_ot.errors import ArchitectureError
from mergekit_ot.graph.axes.reasons import PinReason
from mergekit_ot.graph.capture.questions import Branch


class SlotKind(enum.StrEnum):
    """What a placeholder or an output of a captured program stands for.

    Example:
        >>> SlotKind.PARAMETER == "parameter"
        True
    """

    INPUT = "input"
    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"
    # A tensor that came into a recording from outside: it may have been computed from anything.
    RECORDED = "recorded"
    USER_OUTPUT = "user output"
    MUTATION = "mutation"
    OTHER_OUTPUT = "other output"


INPUT = SlotKind.INPUT
PARAMETER = SlotKind.PARAMETER
BUFFER = SlotKind.BUFFER
CONSTANT = SlotKind.CONSTANT
RECORDED = SlotKind.RECORDED
USER_OUTPUT = SlotKind.USER_OUTPUT
MUTATION = SlotKind.MUTATION
OTHER_OUTPUT = SlotKind.OTHER_OUTPUT


@dataclass(frozen=True)
class ProgramSlot:
    """What a placeholder or an output of the graph is: its kind, and the name in the state where it has one.

    Example:
        >>> from mergekit_ot import trace_model
        >>> program = trace_model(torch.nn.Linear(3, 2), torch.randn(4, 3)).program
        >>> [(str(slot.kind), slot.target) for slot in program.inputs]
        [('parameter', 'weight'), ('parameter', 'bias'), ('input', '')]
    """

    kind: SlotKind
    target: str = ""


@dataclass(frozen=True)
class CapturedProgram:
    """A module as a graph of aten operations.

    Attributes:
        module: The graph; parameters, buffers and constants are placeholders like the inputs.
        inputs: One slot per placeholder, in order.
        outputs: One slot per output, in order.
        tensors: Values of constants, and of parameters and buffers, as they were when the module was captured. Of a
            traced model only what its state dict does not hold, and single numbers such as counters.
        front_end: Name of the front end that made it.
        remarks: Sentences for the user on how it was made.
        module_types: Module path → the types of the module there, the most special first, as qualified names.
        saved: Names that the module's state dict holds: what a file may bring. None where that is not known, and every
            buffer counts as saved.
        branches: Questions in the module's code that were answered one way when it was captured.
        types: Name → the number type of a parameter or buffer when the module was captured, where `tensors` lacks it.

    Example:
        Run with another state than that of the module:

        >>> from mergekit_ot import trace_model
        >>> net, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
        >>> program = trace_model(net, x).program
        >>> halved = {name: value / 2 for name, value in net.state_dict().items()}
        >>> (outputs,) = program.module(*program.arguments(halved, [x]))
        >>> torch.allclose(outputs, net(x) / 2)
        True
    """

    module: fx.GraphModule
    inputs: tuple[ProgramSlot, ...]
    outputs: tuple[ProgramSlot, ...]
    tensors: Mapping[str, Tensor]
    front_end: str
    remarks: tuple[str, ...] = ()
    module_types: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    saved: frozenset[str] | None = None
    branches: tuple[Branch, ...] = ()
    types: Mapping[str, torch.dtype] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        """The operations."""
        return self.module.graph

    @property
    def slots(self) -> dict[fx.Node, ProgramSlot]:
        """Placeholder → what it stands for, in the order of the placeholders."""
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        return dict(zip(placeholders, self.inputs, strict=True))

    @property
    def kept_buffers(self) -> set[str]:
        """The buffers that a forward writes, for the next one to read."""
        return {slot.target for slot in self.outputs if slot.kind == MUTATION}

    def is_saved(self, name: str) -> bool:
        """Whether a state dict holds a buffer, so that its values are those of a file and not of the architecture."""
        return self.saved is None or name in self.saved

    @property
    def state_names(self) -> dict[fx.Node, str]:
        """Placeholder → name in the state, of parameters and buffers: no other tensor has one."""
        return {node: slot.target for node, slot in self.slots.items() if slot.kind in (PARAMETER, BUFFER)}

    def input_values(self, inputs: Sequence[object]) -> dict[fx.Node, object]:
        """Returns the placeholders of inputs with what is given for them, in order."""
        return dict(zip((node for node, slot in self.slots.items() if slot.kind == INPUT), inputs, strict=False))

    def state_value(self, slot: ProgramSlot, state: Mapping[str, Tensor]) -> Tensor:
        """Returns what stands for a slot that is no input: from `state`, or as it was when the module was captured.

        The program computes in the types that it was captured in: a state in half precision is read in them.

        Raises:
            ArchitectureError: Neither holds it.
        """
        if slot.target in state:
            return self.in_own_type(slot.target, state[slot.target])
        if slot.target not in self.tensors:
            raise ArchitectureError(
                f"The program reads '{slot.target}', which the state it is run with lacks. Give a whole state dict."
            )
        return self.tensors[slot.target]

    def in_own_type(self, name: str, value: Tensor) -> Tensor:
        """Returns the value of a parameter or a buffer in the number type that the module had when it was captured."""
        captured = self.types.get(name)
        captured = self.tensors[name].dtype if captured is None and name in self.tensors else captured
        is_cast = captured not in (None, value.dtype) and (value.is_floating_point() or value.is_complex())
        return value.to(captured) if is_cast else value

    def without_weights(self, saved: Collection[str]) -> CapturedProgram:
        """Returns the program without the values that a state dict brings: it is run with one, and keeps no model.

        Single numbers stay: counters of BatchNorm, which older files lack.

        Args:
            saved: Names that the module's state dict holds.
        """
        kept = {name: value for name, value in self.tensors.items() if name not in saved or value.ndim == 0}
        types = {name: value.dtype for name, value in self.tensors.items() if name not in kept}
        return replace(self, tensors=kept, types=types, saved=frozenset(saved))

    def arguments(self, state: Mapping[str, Tensor], inputs: Sequence[object]) -> list[Any]:
        """Returns what the graph is called with, for the parameters and buffers in `state`."""
        given = self.input_values(inputs)
        return [
            given[node] if slot.kind == INPUT else self.state_value(slot, state) for node, slot in self.slots.items()
        ]


_INPUT_KINDS = {
    InputKind.USER_INPUT: INPUT,
    InputKind.PARAMETER: PARAMETER,
    InputKind.BUFFER: BUFFER,
}
_MUTATIONS = ("BUFFER_MUTATION", "PARAMETER_MUTATION")


def from_exported(program: ExportedProgram, front_end: str) -> CapturedProgram:
    """Returns the captured program that a functional exported program is.

    Raises:
        ArchitectureError: A shape in it depends on data, so that it stands for no sizes.
    """
    for node in program.graph.nodes:
        _check_shape(node)
    signature = program.graph_signature
    slots = {
        spec.arg.name: ProgramSlot(_INPUT_KINDS.get(spec.kind, CONSTANT), str(spec.target or ""))
        for spec in signature.input_specs
    }
    placeholders = program.graph.find_nodes(op="placeholder")
    inputs = tuple(slots.get(node.name, ProgramSlot(INPUT)) for node in placeholders)
    # Not every version of torch has all of them.
    kinds = {OutputKind[name]: MUTATION for name in _MUTATIONS if name in OutputKind.__members__}
    kinds[OutputKind.USER_OUTPUT] = USER_OUTPUT
    outputs = tuple(
        ProgramSlot(kinds.get(spec.kind, OTHER_OUTPUT), str(spec.target or "")) for spec in signature.output_specs
    )
    constants = {name: value for name, value in program.constants.items() if isinstance(value, Tensor)}
    return CapturedProgram(program.graph_module, inputs, outputs, {**program.state_dict, **constants}, front_end)


def _check_shape(node: fx.Node) -> None:
    value = node.meta.get("val")
    for size in value.shape if isinstance(value, Tensor) else ():
        if not isinstance(size, int) and not size.node.has_hint():
            raise ArchitectureError(f"the shape of {node.name}{_at(node)} depends on the data")


def reason_of(node: fx.Node) -> PinReason:
    """Returns where an operation stands: its name, module path and source line."""
    path = module_path(node)
    source = ""
    for line in (node.meta.get("stack_trace") or "").splitlines():
        if 'File "' in line and "/torch/" not in line:
            file, _, rest = line.split('File "', 1)[1].partition('", line ')
            source = f"{file.rsplit('/', 1)[-1]}:{rest.split(',')[0]}"
    return PinReason("", str(node.target) if node.op == "call_function" else "", path, source)


def module_path(node: fx.Node) -> str:
    """Returns the path of the innermost module in which an operation stands; empty for the root."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def _at(node: fx.Node) -> str:
    path = module_path(node)
    return f" at '{path}'" if path else ""


def operation_schema(target: object) -> torch.FunctionSchema | None:
    """Returns the schema of an aten operation; None for any other function.

    Example:
        >>> operation_schema(torch.ops.aten.relu.default)
        aten::relu(Tensor self) -> Tensor
    """
    # torch has no public way to an operation's schema; this is the only place that looks.
    return target._schema if isinstance(target, torch._ops.OpOverload) else None


def operation_name(node: fx.Node) -> str:
    """Returns an operation's name without its overload; empty for what is no aten operation.

    Example:
        >>> operation_name(fx.Graph().call_function(torch.ops.aten.add.Tensor))
        'aten.add'
    """
    schema = operation_schema(node.target)
    return "" if schema is None else schema.name.replace("::", ".")


def is_mutating(target: Any) -> bool:
    """Returns whether an operation writes into one of its inputs."""
    schema = operation_schema(target)
    return schema is not None and schema.is_mutable


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """Returns the arguments of an operation by the names of its schema, defaults included.

    Example:
        >>> named_arguments(fx.Graph().call_function(torch.ops.aten.add.Tensor, (1, 2)))
        {'self': 1, 'other': 2, 'alpha': 1}
    """
    schema = operation_schema(node.target)
    if schema is None:
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    bound = {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)}
    bound |= dict(node.kwargs)
    for argument in schema.arguments:
        if argument.name not in bound and argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def shape_of(value: Any) -> tuple[int, ...] | None:
    """Returns the shape of a traced tensor, or None for anything else."""
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else None


def shapes_of(value: Any) -> list[tuple[int, ...] | None] | None:
    """Returns a shape per output of an operation (None for one that is no tensor), or None where none is a tensor."""
    if isinstance(value, Tensor):
        return [shape_of(value)]
    if isinstance(value, tuple | list) and any(isinstance(v, Tensor) for v in value):
        return [shape_of(v) for v in value]
    return None


def unread_outputs(node: fx.Node) -> frozenset[int]:
    """Returns the numbers of those outputs of an operation with several that nothing reads."""
    value = node.meta.get("val")
    if not isinstance(value, tuple | list) or any(user.target is not operator.getitem for user in node.users):
        return frozenset()
    read = [user.args[1] for user in node.users if user.users]
    return frozenset(number for number in range(len(value)) if number not in read)


def is_floating(node: fx.Node) -> bool:
    """Whether a node holds a floating-point tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and (value.is_floating_point() or torch.is_complex(value))
