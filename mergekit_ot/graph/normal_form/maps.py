"""Linear maps of a captured program, the parameters that they read, and who else reads those."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx

from mergekit_ot.graph.capture.program import (
    PARAMETER,
    CapturedProgram,
    module_path,
    named_arguments,
    operation_name,
    shape_of,
)
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.layouts import leaf_groups
from mergekit_ot.graph.normal_form.rewrites import Place, Reader
from mergekit_ot.graph.normal_form.tracking import along, is_check, is_movement, is_whole, moved, numbered

_CONVOLUTIONS = frozenset(("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution"))
_PRODUCTS = {"aten.linear": ("input", "weight", "bias"), "aten.addmm": ("mat1", "mat2", "self")} | {
    f"aten.{name}": ("self", other, None) for name, other in (("mm", "mat2"), ("matmul", "other"))
}


@dataclass(frozen=True)
class Held:
    """Where the numbers of a value stand in the parameter that it was cut from.

    Attributes:
        name: The parameter, by the name under which it is described.
        axes: For every axis of the value, the parameter's axis and where the value starts on it.
    """

    name: str
    axes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LinearMap:
    """A linear map of a program.

    Attributes:
        node: Its operation.
        output: The operation that holds its result, bias included.
        source: The operation whose result it reads.
        axis: The axis of its neurons in what it reads and makes.
        reader: Its weight and bias.
        outputs: How many it has.
        inputs: How many it has.
    """

    node: fx.Node
    output: fx.Node
    source: fx.Node
    axis: int
    reader: Reader
    outputs: int
    inputs: int

    @property
    def bias(self) -> Place | None:
        """Where its bias stands."""
        name, start = self.reader.bias, self.reader.bias_start
        return None if name is None else Place(name, 0, 0, (start, start + self.outputs))

    @property
    def is_padded(self) -> bool:
        """Whether it reads zeros around what it is given."""
        padding = named_arguments(self.node).get("padding", 0)
        return padding != "valid" if isinstance(padding, str) else bool(torch.tensor(padding).any())

    @property
    def rows(self) -> Place:
        """Its outputs in the weight."""
        weight = self.reader.weight
        return Place(weight.name, self.reader.outputs_axis, weight.rows_axis, weight.rows)


class ProgramView:
    """What the search for a normal form asks of a traced model.

    Args:
        graph: Its graph, with the program.
    """

    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph
        self.program: CapturedProgram = graph.program
        self.nodes: list[fx.Node] = list(self.program.graph.nodes)
        self._slots = self.program.slots

    @cached_property
    def live(self) -> frozenset[fx.Node]:
        """Nodes on which an output depends."""
        seen: set[fx.Node] = set()
        waiting = [node for node in self.nodes if node.op == "output"]
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting += node.all_input_nodes
        return frozenset(seen)

    def users(self, node: fx.Node) -> list[fx.Node]:
        """Returns the operations that read a node and on which an output depends."""
        return [user for user in node.users if user in self.live and not is_check(user)]

    def name_of(self, node: object) -> str | None:
        """Returns the described name of the parameter that a placeholder stands for; None for anything else."""
        slot = self._slots.get(node) if isinstance(node, fx.Node) else None
        if slot is None or slot.kind != PARAMETER:
            return None
        return self.graph.aliases.get(slot.target, slot.target)

    def groups_on(self, name: str, axis: int) -> tuple[str, ...]:
        """Returns the keys of the groups that stand on an axis of a parameter, pinned ones included."""
        return tuple(dict.fromkeys(self._groups.get((name, axis), ())))

    @cached_property
    def _groups(self) -> dict[tuple[str, int], list[str]]:
        places: dict[tuple[str, int], list[str]] = {}
        for key, group in self.graph.groups.items():
            for slot in group.members:
                places.setdefault((slot.parameter, slot.axis), []).append(key)
        return places

    def is_joined(self, name: str, axis: int) -> bool:
        """Whether several free groups stand on an axis one after the other."""
        return len(leaf_groups(self.graph.layouts[name][axis])) > 1

    def tied(self, names: Iterator[str]) -> tuple[tuple[str, str], ...]:
        """Returns the further names of these parameters, each with the described one."""
        described = set(names)
        return tuple((further, name) for further, name in self.graph.aliases.items() if name in described)

    def held(self, node: object) -> Held | None:
        """Returns which part of which parameter a value is; None where it is none, or not a plain stretch."""
        path: list[fx.Node] = []
        while isinstance(node, fx.Node) and node.op != "placeholder" and is_movement(node):
            path.append(node)
            node = node.args[0]
        name, shape = self.name_of(node), shape_of(node.meta.get("val")) if isinstance(node, fx.Node) else None
        if name is None or shape is None or not isinstance(node, fx.Node):
            return None
        axes: dict[int, tuple[int, int]] = {}
        for axis in range(len(shape)):
            value = _carried(numbered(shape, axis), node, path)
            if not isinstance(value, Tensor) or value.ndim != len(shape):
                return None
            for place in range(value.ndim):
                line = along(value, place)
                if line is not None and place not in axes and _is_stretch(line, shape[axis]):
                    axes[place] = (axis, int(line[0]))
                    break
        if sorted(axis for axis, _ in axes.values()) != list(range(len(shape))):
            return None
        return Held(name, tuple(axes[place] for place in range(len(shape))))

    @cached_property
    def maps(self) -> dict[fx.Node, LinearMap]:
        """The linear maps by their operation."""
        linear_maps = (self._map(node) for node in self.nodes if node in self.live)
        return {linear_map.node: linear_map for linear_map in linear_maps if linear_map is not None}

    def _map(self, node: fx.Node) -> LinearMap | None:
        operation = operation_name(node)
        if operation in _CONVOLUTIONS:
            return self._convolution(node)
        if operation not in _PRODUCTS:
            return None
        arguments = named_arguments(node)
        read, weight, bias = (None if name is None else arguments.get(name) for name in _PRODUCTS[operation])
        held, bias_held = self.held(weight), self.held(bias)
        if not isinstance(read, fx.Node) or held is None or len(held.axes) != 2:
            return None
        if bias is not None and (bias_held is None or len(bias_held.axes) != 1):
            return None
        rows, columns = (0, 1) if operation == "aten.linear" else (1, 0)
        return self._with_bias(node, read, -1, held, (rows, columns), bias_held)

    def _convolution(self, node: fx.Node) -> LinearMap | None:
        arguments = named_arguments(node)
        held, bias, bias_held = self.held(arguments["weight"]), arguments.get("bias"), self.held(arguments.get("bias"))
        if arguments.get("transposed", False) or arguments.get("groups", 1) != 1 or held is None:
            return None
        if bias is not None and bias_held is None:
            return None
        return self._with_bias(node, arguments["input"], 1, held, (0, 1), bias_held)

    def _with_bias(
        self, node: fx.Node, read: fx.Node, axis: int, held: Held, places: tuple[int, int], bias: Held | None
    ) -> LinearMap | None:
        """Returns a map of a weight; a bias that alone is added afterwards is its own."""
        sizes = self.graph_shape(held.name)
        (rows_axis, start), (columns_axis, first) = (held.axes[place] for place in places)
        result = shape_of(node.meta.get("val")) or ()
        outputs, inputs = result[axis], sizes[columns_axis]
        if first or len(held.axes) != len(sizes) or (shape_of(read.meta.get("val")) or ())[axis] != inputs:
            return None
        output = node
        if bias is None and axis == -1:
            output, bias = self._added(node, outputs)
        weight = Place(held.name, columns_axis)
        if outputs != sizes[rows_axis]:
            weight = Place(held.name, columns_axis, rows_axis, (start, start + outputs))
        reader = Reader(weight, rows_axis, bias and bias.name, bias.axes[0][1] if bias else 0)
        return LinearMap(node, output, read, axis, reader, outputs, inputs)

    def graph_shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a parameter."""
        return self._shapes[name]

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        names = ((self.name_of(node), shape_of(node.meta.get("val"))) for node in self._slots)
        return {name: shape for name, shape in names if name is not None and shape is not None}

    def _added(self, node: fx.Node, size: int) -> tuple[fx.Node, Held | None]:
        """Returns the sum that alone reads a product and adds a vector to it, and the vector; the product otherwise."""
        users = self.users(node)
        if len(users) != 1 or operation_name(users[0]) != "aten.add" or named_arguments(users[0])["alpha"] != 1:
            return node, None
        others = [used for used in users[0].args[:2] if used is not node]
        held = self.held(others[0]) if others else None
        if held is None or len(held.axes) != 1 or self.graph_shape(held.name)[0] < size:
            return node, None
        return users[0], held

    @cached_property
    def _placeholders(self) -> dict[str, list[fx.Node]]:
        """The placeholders of every parameter: several where it is tied."""
        placeholders: dict[str, list[fx.Node]] = {}
        for node in self._slots:
            name = self.name_of(node)
            if name is not None:
                placeholders.setdefault(name, []).append(node)
        return placeholders

    def readers_of(self, name: str) -> list[fx.Node]:
        """Returns the operations that read a parameter, behind casts and cuts."""
        waiting = list(self._placeholders.get(name, ()))
        terminal: dict[fx.Node, None] = {}
        while waiting:
            for user in self.users(waiting.pop()):
                if is_movement(user):
                    waiting.append(user)
                else:
                    terminal[user] = None
        return list(terminal)

    @cached_property
    def by_output(self) -> dict[fx.Node, LinearMap]:
        """The linear maps by the operation that holds their result."""
        return {linear_map.output: linear_map for linear_map in self.maps.values()}

    def where(self, node: fx.Node) -> str:
        """Returns an operation's name and module for a sentence."""
        path = module_path(node)
        name = operation_name(node) or ("the output" if node.op == "output" else str(node.target))
        return f"{name} in '{path}'" if path else name


def reads_whole(linear_map: LinearMap, neurons: Tensor) -> bool:
    """Whether a map reads tracked neurons along its inputs, all and in order."""
    return is_whole(neurons, linear_map.axis, linear_map.inputs)


def _carried(value: Tensor, start: fx.Node, path: list[fx.Node]) -> object:
    """Returns a value taken along movements, the last one first."""
    tracked: dict[fx.Node, object] = {start: value}
    for node in reversed(path):
        result = moved(node, tracked)
        if result is None:
            return None
        tracked[node] = result
    return tracked[path[0]] if path else value


def _is_stretch(line: Tensor, size: int) -> bool:
    """Whether indices are consecutive; one index is a stretch only of an axis of one."""
    if len(line) == 1:
        return size == 1
    return bool((line == line[0] + torch.arange(len(line))).all())
