"""What a network does with the parameters on which a stream stands: which write it, which read it, which scale it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from mergekit_ot import CapturedProgram, ModelGraph, NeuronGroup, leaf_groups, named_arguments, operation_name
from mergeot_repair.programs.layouts import stretches
from mergeot_repair.programs.maps import CONVOLUTION, LINEAR, LinearMap

_EMBEDDING, _LINEAR = "aten.embedding", "aten.linear"
_SUMS = ("aten.add", "aten.sub")
# What a vector does, and the number at which one multiplies alike: an offset is a gain's distance from one.
_SHIFT, _GAIN, _OFFSET = "shift", "gain", "offset"
_GAINS = {_GAIN: 1.0, _OFFSET: 0.0}


@dataclass(frozen=True)
class Tie:
    """An embedding whose weight is also that of a linear map which reads the stream.

    Attributes:
        weight: Its name.
        node: The linear map's operation.
        source: The operation whose result it reads.
    """

    weight: str
    node: str
    source: str


@dataclass(frozen=True)
class Roles:
    """Where a group of neurons stands, by what is done with it.

    Attributes:
        readers: Linear maps whose columns are the neurons.
        writers: Linear maps whose rows are the neurons.
        images: Embeddings and parameters that are added as they are, each with the axis of the neurons.
        gains: Vectors that multiply, or become what multiplies, with the number at which they multiply alike.
        shifts: Vectors that are added behind norms, or to the stream itself, each with the operations that read it.
        tie: An embedding that is read as well.
    """

    readers: tuple[LinearMap, ...]
    writers: tuple[LinearMap, ...]
    images: tuple[tuple[str, int], ...]
    gains: Mapping[str, float]
    shifts: Mapping[str, tuple[str, ...]]
    tie: Tie | None = None


def roles_of(
    group: NeuronGroup, graph: ModelGraph, program: CapturedProgram, maps: Sequence[LinearMap]
) -> Roles | None:
    """Returns the roles of a group's parameters; None where one has a role that is none of these."""
    sorting = _Sorting(graph, program, maps)
    for parameter, axis in group.places:
        if stretches(graph, parameter, axis) != [(group.key, 1)] or not sorting.add(parameter, axis, group.key):
            return None
    return sorting.roles()


class _Sorting:
    """Sorts parameters by what reads them.

    Args:
        graph: Of the network.
        program: What it computes.
        maps: Its linear maps.
    """

    def __init__(self, graph: ModelGraph, program: CapturedProgram, maps: Sequence[LinearMap]) -> None:
        self.graph = graph
        self.by_weight = {linear_map.weight: linear_map for linear_map in maps}
        self.biases = {linear_map.bias: linear_map for linear_map in maps if linear_map.bias is not None}
        self.users: dict[str, list[fx.Node]] = {}
        self.placeholders: dict[fx.Node, str] = {}
        for node, name in program.state_names.items():
            name = graph.aliases.get(name, name)
            self.users.setdefault(name, []).extend(node.users)
            self.placeholders[node] = name
        self.readers: list[LinearMap] = []
        self.writers: list[LinearMap] = []
        self.images: list[tuple[str, int]] = []
        self.gains: dict[str, float] = {}
        self.shifts: dict[str, tuple[str, ...]] = {}
        self.ties: list[Tie] = []

    def roles(self) -> Roles | None:
        """Returns what was sorted; None where biases or ties are not as they must be."""
        if len(self.ties) > 1 or not self.readers:
            return None
        tie = self.ties[0] if self.ties else None
        return Roles(
            tuple(self.readers), tuple(self.writers), tuple(self.images), dict(self.gains), dict(self.shifts), tie
        )

    def add(self, parameter: str, axis: int, group: str) -> bool:
        """Sorts a parameter; False where it has no role of these."""
        linear_map = self.by_weight.get(parameter)
        if linear_map is not None:
            return self._add_map(linear_map, axis, group)
        owner = self.biases.get(parameter)
        if owner is not None:
            return owner.norm is None and stretches(self.graph, owner.weight, owner.output_axis) == [(group, 1)]
        users = self.users.get(parameter, [])
        operations = {operation_name(user) for user in users}
        if not users:
            return False
        if _EMBEDDING in operations:
            return axis == 1 and self._add_embedding(parameter, users)
        if len(self.graph.layouts[parameter]) > 1:
            self.images.append((parameter, axis))
            return self._is_in_place(parameter, axis)
        return self._add_vector(parameter, users)

    def _add_map(self, linear_map: LinearMap, axis: int, group: str) -> bool:
        if linear_map.norm is not None or linear_map.groups > 1 or linear_map.kind not in (LINEAR, CONVOLUTION):
            return False
        layouts = self.graph.layouts[linear_map.weight]
        if axis == linear_map.output_axis:
            self.writers.append(linear_map)
            return stretches(self.graph, linear_map.weight, linear_map.input_axis) != [(group, 1)]
        self.readers.append(linear_map)
        is_twice = stretches(self.graph, linear_map.weight, linear_map.output_axis) == [(group, 1)]
        return linear_map.kind == LINEAR and len(layouts) == 2 and not is_twice

    def _add_embedding(self, parameter: str, users: Sequence[fx.Node]) -> bool:
        linear = [user for user in users if operation_name(user) == _LINEAR]
        others = [user for user in users if operation_name(user) not in (_EMBEDDING, _LINEAR)]
        if others or not self._is_in_place(parameter, 1):
            return False
        for user in linear:
            arguments = named_arguments(user)
            if arguments.get("bias") is not None or self.placeholders.get(arguments["weight"]) != parameter:
                return False
            self.ties.append(Tie(parameter, user.name, arguments["input"].name))
        if not linear:
            self.images.append((parameter, 1))
        return True

    def _add_vector(self, parameter: str, users: Sequence[fx.Node]) -> bool:
        """Sorts a vector, which is the same wherever it is read: a norm may be called several times."""
        uses = {self._use_of(parameter, user) for user in users}
        if len(uses) > 1 or (uses == {None} and len(users) > 1):
            return False
        use = uses.pop()
        if use is None:
            self.images.append((parameter, 0))
        elif use == _SHIFT:
            self.shifts[parameter] = tuple(user.name for user in users)
        else:
            self.gains[parameter] = _GAINS[use]
        return True

    def _use_of(self, parameter: str, user: fx.Node) -> str | None:
        """Returns what a vector does: it multiplies, is added, or is neither and so part of the stream (None)."""
        place = next((name for name, value in named_arguments(user).items() if self._is(value, parameter)), "")
        operation = operation_name(user)
        if operation == "aten.mul" or place == "weight":
            return _GAIN
        if place == "bias":
            return _SHIFT
        if operation not in _SUMS:
            return None
        others = [value for value in user.args if not self._is(value, parameter)]
        return _SHIFT if any(isinstance(value, fx.Node) for value in others) else _OFFSET

    def _is(self, value: object, parameter: str) -> bool:
        return isinstance(value, fx.Node) and self.placeholders.get(value) == parameter

    def _is_in_place(self, parameter: str, axis: int) -> bool:
        """Whether nothing else that stands on a parameter may be reordered."""
        for other, layout in enumerate(self.graph.layouts[parameter]):
            if other != axis:
                for group in leaf_groups(layout):
                    if self.graph.groups[group].is_free:
                        return False
        return True
