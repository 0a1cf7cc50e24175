"""Follows what writes to a group of neurons through sums to what reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from mergekit_ot.graph.capture.program import named_arguments, operation_name, shape_of
from mergekit_ot.graph.normal_form.maps import ProgramView
from mergekit_ot.graph.normal_form.norms import Norm
from mergekit_ot.graph.normal_form.rewrites import Place
from mergekit_ot.graph.normal_form.tracking import is_whole, moved, numbered, stripped

_SUMS = frozenset(("aten.add", "aten.sub"))
_SCALINGS = frozenset(("aten.mul", "aten.div"))


@dataclass
class Stream:
    """Values that are sums of each other, and what reads and makes them."""

    makers: dict[fx.Node, tuple[Place, ...]] = field(default_factory=dict)
    strangers: list[fx.Node] = field(default_factory=list)
    odd: list[fx.Node] = field(default_factory=list)
    has_norm: bool = False

    @property
    def is_fit(self) -> bool:
        """Whether LayerNorms read it, and nothing else does."""
        return self.has_norm and not self.odd


class StreamFinder:
    """Follows what writes to one group through sums, to what reads it.

    Args:
        view: The program.
        key: The group.
        norms: The LayerNorms.
    """

    def __init__(self, view: ProgramView, key: str, norms: Sequence[Norm]) -> None:
        self._view = view
        self._key = key
        self._tracked: dict[fx.Node, Tensor] = {}
        self._values: dict[fx.Node, object] = {}
        self._parent: dict[fx.Node, fx.Node] = {}
        self._norm_nodes = {node: norm for norm in norms for node in norm.inner}
        self._makers: dict[fx.Node, tuple[Place, ...]] = {}

    def find(self) -> list[Stream]:
        """Returns the streams of the group."""
        for node in self._view.nodes:
            if node not in self._view.live:
                continue
            places = self._made(node)
            if places:
                self._makers[node] = places
            elif node.op == "call_function" and node not in self._norm_nodes:
                self._pass_on(node)
        return self._collected()

    def sums_of(self, node: fx.Node, name: str) -> list[fx.Node]:
        """Returns the operations by which a parameter writes to a stream: its map, or the sums that it stands in."""
        if node.op != "placeholder":
            return [node]
        return [user for user in self._view.readers_of(name) if user in self._tracked]

    def is_complete(self, streams: Sequence[Stream]) -> bool:
        """Whether the streams hold everything that writes to the group, gains and biases of norms aside."""
        written = {place.name for stream in streams for places in stream.makers.values() for place in places}
        members = self._view.graph.groups[self._key].members
        affine = {name for norm in self._norm_nodes.values() for name in (norm.gain, norm.bias)}
        makers = {slot.parameter for slot in members if not slot.is_reader} - affine
        return makers <= written

    def _made(self, node: fx.Node) -> tuple[Place, ...]:
        """Returns the places of parameters that make a value of the group, which is tracked from there."""
        shape = shape_of(node.meta.get("val"))
        if not shape:
            return ()
        linear_map = self._view.by_output.get(node)
        if linear_map is not None:
            reader = linear_map.reader
            if self._is_on(reader.weight.name, reader.outputs_axis) and reader.weight.rows_axis is None:
                self._track(node, linear_map.axis % len(shape))
                bias = linear_map.bias
                return (Place(reader.weight.name, reader.outputs_axis), *((Place(bias.name, 0),) if bias else ()))
            return ()
        if operation_name(node) == "aten.embedding":
            held = self._view.held(named_arguments(node)["weight"])
            if held is not None and len(held.axes) == 2 and self._is_on(held.name, held.axes[1][0]):
                self._track(node, len(shape) - 1)
                return (Place(held.name, held.axes[1][0]),)
            return ()
        name = self._view.name_of(node)
        axes = [axis for axis in range(len(shape)) if name is not None and self._is_on(name, axis)]
        if name is None or len(axes) != 1 or self._is_used_as_weight(node):
            return ()
        self._track(node, axes[0])
        return (Place(name, axes[0]),)

    def _is_used_as_weight(self, node: fx.Node) -> bool:
        """Whether no sum or copy reads a parameter: it is a weight, a table, a gain."""
        name = self._view.name_of(node)
        readers = self._view.readers_of(name) if name is not None else []
        affine = {n for norm in self._norm_nodes.values() for n in norm.affine}
        plain = [r for r in readers if r not in self._view.maps and r not in affine]
        return not any(operation_name(r) in (*_SUMS, "aten.cat") and r not in self._view.by_output for r in plain)

    def _is_on(self, name: str, axis: int) -> bool:
        return self._view.groups_on(name, axis) == (self._key,)

    def _track(self, node: fx.Node, axis: int) -> None:
        shape = shape_of(node.meta.get("val")) or ()
        self._tracked[node] = self._values[node] = numbered(shape, axis)
        self._parent[node] = node

    def _root(self, node: fx.Node) -> fx.Node:
        while self._parent[node] is not node:
            node = self._parent[node]
        return node

    def _pass_on(self, node: fx.Node) -> None:
        """Tracks the result of an operation that keeps what is read modulo the mean; joins what it adds."""
        sources = [used for used in node.all_input_nodes if used in self._tracked]
        if not sources:
            return
        operation = operation_name(node)
        result = moved(node, self._values) if operation not in (*_SUMS, *_SCALINGS, "aten.cat") else None
        if result is None and operation in (*_SUMS, *_SCALINGS, "aten.cat"):
            result = self._combined(node, operation)
        if isinstance(result, tuple | list):
            self._values[node], self._tracked[node] = result, result[0]
        elif isinstance(result, Tensor):
            self._values[node] = self._tracked[node] = result
        else:
            return
        self._parent[node] = self._root(sources[0])
        for other in sources[1:]:
            self._parent[self._root(other)] = self._root(sources[0])

    def _combined(self, node: fx.Node, operation: str) -> Tensor | None:
        """Returns the neurons of a sum, a product with a number per place, or a concatenation along another axis."""
        shape = shape_of(node.meta.get("val")) or ()
        arguments = node.args[0] if operation == "aten.cat" else node.args[:2]
        given = [argument for argument in arguments if isinstance(argument, fx.Node)]  # type: ignore[union-attr]
        lines = {_line(self._tracked[argument]) for argument in given if argument in self._tracked}
        line = lines.pop()
        if line is None or lines:
            return None
        from_end, size = line
        result = numbered(shape, len(shape) - from_end)
        if shape[len(shape) - from_end] != size:
            return None
        if operation == "aten.cat":
            return None if named_arguments(node)["dim"] % len(shape) == len(shape) - from_end else result
        if operation in _SUMS:
            return result
        others = [argument for argument in arguments if argument not in self._tracked]  # type: ignore[union-attr]
        is_product = len(others) == 1 and (operation == "aten.mul" or others[0] is node.args[1])
        return result if is_product and _is_narrow(others[0], from_end) else None

    def _collected(self) -> list[Stream]:
        streams: dict[fx.Node, Stream] = {}
        for node in self._tracked:
            stream = streams.setdefault(self._root(node), Stream())
            if node in self._makers:
                stream.makers[node] = self._makers[node]
            for user in self._view.users(node):
                self._enter(stream, node, user)
        return list(streams.values())

    def _enter(self, stream: Stream, node: fx.Node, user: fx.Node) -> None:
        """Enters in a stream what an operation that reads one of its values does."""
        norm = self._norm_nodes.get(user)
        if norm is not None:
            neurons = self._tracked[node]
            if stripped(norm.source) is stripped(node) and is_whole(neurons, neurons.ndim - 1, norm.size):
                stream.has_norm = True
            else:
                stream.odd.append(user)
        elif user not in self._tracked:
            # A parameter that writes to the stream and is read elsewhere too is looked at for the whole tensor.
            if node.op != "placeholder":
                stream.odd.append(user)
        elif operation_name(user) in (*_SUMS, "aten.cat"):
            given = user.args[0] if operation_name(user) == "aten.cat" else user.args[:2]
            neurons = _line(self._tracked[node])
            for other in given:  # type: ignore[union-attr]
                is_known = other in self._tracked or neurons is None or _is_narrow(other, neurons[0])
                if not is_known and other not in stream.strangers:
                    stream.strangers.append(other)  # type: ignore[arg-type]


def _line(neurons: Tensor) -> tuple[int, int] | None:
    """Returns the axis of the neurons, from the end, and how many there are."""
    for axis in range(neurons.ndim):
        if neurons.shape[axis] > 1 and is_whole(neurons, axis, neurons.shape[axis]):
            return neurons.ndim - axis, neurons.shape[axis]
    return None


def _is_narrow(value: object, from_end: int) -> bool:
    """Whether a value is one number for all neurons of a place."""
    if not isinstance(value, fx.Node):
        return True
    shape = shape_of(value.meta.get("val")) or ()
    return len(shape) < from_end or shape[len(shape) - from_end] == 1
