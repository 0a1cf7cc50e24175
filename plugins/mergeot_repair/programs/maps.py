"""Finds the linear maps of a captured program: which parameters they have, what they read and what they make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from mergekit_ot import CapturedProgram, RepairContext, named_arguments, operation_name

LINEAR, CONVOLUTION, TRANSPOSED, RECURRENT = "linear", "convolution", "transposed", "recurrent"
_NORMS = ("aten._native_batch_norm_legit_no_training", "aten.batch_norm", "aten.native_batch_norm")
_CONVOLUTIONS = ("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution")
_TRANSPOSED = ("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d")
_RECURRENT = ("aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu")
# Movements that hold every number of their input once: a value can be taken back through them.
_RESHAPES = ("aten.view", "aten._unsafe_view", "aten.reshape", "aten.flatten", "aten.unsqueeze", "aten.squeeze")
_COPIES = ("aten.clone", "aten.contiguous", "aten.dropout", "aten.alias", "aten.detach")
_TURNS = ("aten.transpose", "aten.permute", "aten.t")


_MOVEMENTS = (*_RESHAPES, *_COPIES, *_TURNS)


@dataclass(frozen=True)
class Norm:
    """A BatchNorm behind a linear map.

    Attributes:
        scale: Name of its scale, or None.
        shift: Name of its shift, or None.
        mean: Name of its running mean.
        variance: Name of its running variance.
        epsilon: What it adds to the variance.
    """

    scale: str | None
    shift: str | None
    mean: str
    variance: str
    epsilon: float

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all that it has."""
        return tuple(name for name in (self.scale, self.shift, self.mean, self.variance) if name is not None)


@dataclass(frozen=True)
class LinearMap:
    """A linear map of a program.

    Attributes:
        kind: ``linear``, ``convolution``, ``transposed`` (a transposed convolution) or ``recurrent``.
        node: Its operation.
        source: The operation whose result it reads.
        weight: Name of its weight.
        bias: Name of its bias, or None.
        norm: The BatchNorm that alone reads it, or None.
        output: The operation whose result is to be what the sources make: the map, or its BatchNorm.
        added: The sum that alone reads the output, and the operation it is added to; None where there is none.
        path: Movements between the output and the sum, in order.
        parameters: All parameters of a recurrent layer.
        groups: Groups of channels that each read their own part of the input.
        is_turned: Whether the weight of a linear layer has its inputs on axis 0, and its outputs on axis 1.
    """

    kind: str
    node: str
    source: str
    weight: str
    bias: str | None = None
    norm: Norm | None = None
    output: str = ""
    added: tuple[str, str] | None = None
    path: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    groups: int = 1
    is_turned: bool = False

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of its weight, or of all parameters of a recurrent layer."""
        return self.parameters or (self.weight,)

    @property
    def output_axis(self) -> int:
        """The weight's axis of outputs."""
        return 1 if self.kind == TRANSPOSED or self.is_turned else 0

    @property
    def input_axis(self) -> int:
        """The weight's axis of inputs."""
        return 1 - self.output_axis

    @property
    def values_axis(self) -> int:
        """The axis of its neurons in what it reads and makes."""
        return 1 if self.kind in (CONVOLUTION, TRANSPOSED) else -1

    @property
    def has_shift(self) -> bool:
        """Whether its outputs may be shifted, by its bias or by the BatchNorm behind it."""
        return (self.bias if self.norm is None else self.norm.shift) is not None

    @property
    def is_plain(self) -> bool:
        """Whether every output reads every input, by rows of the weight."""
        return self.kind in (LINEAR, CONVOLUTION) and self.groups == 1 and not self.is_turned


def free_maps(context: RepairContext) -> list[LinearMap]:
    """Returns the linear maps of a fused network that a repair may change: all but what the user keeps.

    Heads of all sources beside each other are fitted to what all sources make; where one has no weight, they stay.
    """
    stay = context.kept if all(weight > 0 for weight in context.model_weights) else context.kept | context.joined
    return [each for each in MapFinder(context.program).find() if not stay & {*each.weights, each.weight}]


class MapFinder:
    """Looks for the linear maps of one program.

    Args:
        program: The captured program; its parameters and buffers are placeholders.
    """

    def __init__(self, program: CapturedProgram) -> None:
        self.program = program
        # Only what the caller's state holds by name can be changed; a tensor recorded from elsewhere cannot.
        self.names = program.state_names

    def find(self) -> list[LinearMap]:
        """Returns the maps in the order of the program; a weight that stands in several is left out."""
        maps = [linear_map for linear_map in map(self._map, self.program.graph.nodes) if linear_map is not None]
        counts: Counter[str] = Counter()
        for linear_map in maps:
            counts.update(linear_map.weights)
        once = {name for name, count in counts.items() if count == 1}
        return [linear_map for linear_map in maps if once.issuperset(linear_map.weights)]

    def _map(self, node: fx.Node) -> LinearMap | None:
        if node.op != "call_function":
            return None
        operation = operation_name(node)
        if operation == "aten.linear":
            return self._linear(node, LINEAR)
        if operation == "aten.addmm":
            return self._addmm(node)
        if operation in (*_CONVOLUTIONS, *_TRANSPOSED):
            is_transposed = operation in _TRANSPOSED or named_arguments(node).get("transposed", False)
            kind = TRANSPOSED if is_transposed else CONVOLUTION
            return self._linear(node, kind)
        if operation in _RECURRENT:
            return self._recurrent(node)
        return None

    def _only(self, node: fx.Node, argument: str) -> str | None:
        """Returns the parameter that an argument is, if nothing else reads it."""
        value = named_arguments(node).get(argument)
        if not isinstance(value, fx.Node) or len(value.users) != 1:
            return None
        return self.names.get(value)

    def _linear(self, node: fx.Node, kind: str) -> LinearMap | None:
        arguments = named_arguments(node)
        source, groups = arguments["input"], int(arguments.get("groups", 1))
        weight, bias = self._only(node, "weight"), self._only(node, "bias")
        is_shared = bias is None and arguments.get("bias") is not None
        if weight is None or is_shared or not isinstance(source, fx.Node):
            return None
        # The outputs of a transposed convolution with groups stand on no single axis of its weight.
        if kind == TRANSPOSED and groups > 1:
            return None
        return self._with_readers(LinearMap(kind, node.name, source.name, weight, bias, groups=groups), node)

    def _addmm(self, node: fx.Node) -> LinearMap | None:
        """``input @ weight.T + bias`` as a front end may write a linear layer, or ``input @ weight + bias``."""
        arguments = named_arguments(node)
        source, matrix, bias = arguments["mat1"], arguments["mat2"], self._only(node, "self")
        if not isinstance(source, fx.Node) or bias is None or not _is_plain_sum(arguments):
            return None
        weight, is_turned = self._only(node, "mat2"), True
        if isinstance(matrix, fx.Node) and operation_name(matrix) in ("aten.t", "aten.transpose"):
            weight, is_turned = self._only(matrix, "self") if len(matrix.users) == 1 else None, False
        if weight is None:
            return None
        linear_map = LinearMap(LINEAR, node.name, source.name, weight, bias, is_turned=is_turned)
        return self._with_readers(linear_map, node)

    def _recurrent(self, node: fx.Node) -> LinearMap | None:
        arguments = named_arguments(node)
        source, parameters = arguments.get("input"), arguments["params"]
        names = [self.names[value] for value in parameters if value in self.names and len(value.users) == 1]
        if source is None or len(names) < len(parameters):
            return None
        return LinearMap(RECURRENT, node.name, source.name, names[0], output=node.name, parameters=tuple(names))

    def _with_readers(self, linear_map: LinearMap, node: fx.Node) -> LinearMap:
        """Returns a map with the BatchNorm and the sum that read it."""
        norm, end = self._norm_of(node)
        path, added = self._sum_of(end)
        return replace(linear_map, norm=norm, output=end.name, added=added, path=path)

    def _norm_of(self, node: fx.Node) -> tuple[Norm | None, fx.Node]:
        """Returns the BatchNorm that alone reads a map, if there is one, and the operation whose result counts."""
        users = list(node.users)
        if len(users) != 1 or operation_name(users[0]) not in _NORMS:
            return None, node
        arguments = named_arguments(users[0])
        names = self._all_only(users[0], ("weight", "bias", "running_mean", "running_var"))
        end = _normalised(users[0])
        if names is None or end is None or arguments.get("training", False):
            return None, node
        scale, shift, mean, variance = names
        if mean is None or variance is None:
            return None, node
        return Norm(scale, shift, mean, variance, float(arguments["eps"])), end

    def _all_only(self, node: fx.Node, arguments: Sequence[str]) -> list[str | None] | None:
        """Returns the parameters that arguments are, None for one that is not given; None if others read one."""
        given = named_arguments(node)
        names = [self._only(node, argument) for argument in arguments]
        for argument, name in zip(arguments, names, strict=True):
            if name is None and given.get(argument) is not None:
                return None
        return names

    def _sum_of(self, node: fx.Node) -> tuple[tuple[str, ...], tuple[str, str] | None]:
        """Follows movements to a sum that alone reads them: the movements, and the sum with what is added."""
        path: list[str] = []
        while len(node.users) == 1:
            (user,) = node.users
            if operation_name(user) not in _MOVEMENTS:
                return tuple(path), self._added_by(user, node)
            path.append(user.name)
            node = user
        return tuple(path), None

    def _added_by(self, total: fx.Node, node: fx.Node) -> tuple[str, str] | None:
        """Returns a sum that reads a value, and what it adds to it; None for anything else."""
        if operation_name(total) != "aten.add" or named_arguments(total).get("alpha", 1) != 1:
            return None
        first, second = total.args[:2]
        other = second if first is node else first
        if not isinstance(other, fx.Node) or other is node or other in self.names:
            return None
        # A sum that broadcasts has more places than the map.
        return (total.name, other.name) if other.meta["val"].shape == node.meta["val"].shape else None


def _is_plain_sum(arguments: Mapping[str, Any]) -> bool:
    """Whether a sum of a vector and a product has one number per output to add, and no factors."""
    vector = arguments["self"].meta["val"]
    return vector.ndim == 1 and len(vector) > 1 and arguments.get("alpha", 1) == 1 == arguments.get("beta", 1)


def _normalised(norm: fx.Node) -> fx.Node | None:
    """Returns the operation that is a BatchNorm's first result; None where there is no single one."""
    if operation_name(norm) == "aten.batch_norm":
        return norm
    results = [user for user in norm.users if user.args[1] == 0]
    return results[0] if len(results) == 1 else None


def taken_back(value: Any, path: list[fx.Node]) -> Any:
    """Returns a value at the end of movements as it would stand before them."""
    for node in reversed(path):
        shape = node.args[0].meta["val"].shape  # type: ignore[union-attr]
        operation = operation_name(node)
        if operation in _TURNS:
            value = _turned_back(value, node)
        elif operation in _RESHAPES:
            value = value.reshape(shape)
    return value


def _turned_back(value: Any, node: fx.Node) -> Any:
    operation, arguments = operation_name(node), named_arguments(node)
    if operation == "aten.permute":
        order = [axis % value.ndim for axis in arguments["dims"]]
        return value.permute([order.index(axis) for axis in range(value.ndim)])
    if operation == "aten.t":
        return value.t()
    return value.transpose(arguments["dim0"], arguments["dim1"])
