"""Finds the linear maps of a captured program: which parameters they have, what they read and what they make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from mergekit_ot import CapturedProgram, named_arguments, operation_name

LINEAR, CONVOLUTION, TRANSPOSED, RECURRENT = "linear", "convolution", "transposed", "recurrent"
_NORMS = ("aten._native_batch_norm_legit_no_training", "aten.batch_norm", "aten.native_batch_norm")
_CONVOLUTIONS = ("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution")
_TRANSPOSED = ("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d")
_RECURRENT = ("aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu")
# Movements that hold every number of their input once: a value can be taken back through them.
_RESHAPES = ("aten.view", "aten._unsafe_view", "aten.reshape", "aten.flatten", "aten.unsqueeze", "aten.squeeze")
_COPIES = ("aten.clone", "aten.contiguous", "aten.dropout", "aten.alias", "aten.detach")
_TURNS = ("aten.transpose", "aten.permute", "aten.t")


@dataclass(frozen=True)
class LinearMap:
    """A linear map of a program.

    Attributes:
        kind: ``linear``, ``convolution``, ``transposed`` (a transposed convolution) or ``recurrent``.
        node: Its operation.
        source: The operation whose result it reads.
        weight: Name of its weight.
        bias: Name of its bias, or None.
        norm: Names of the scale, shift, mean and variance of the BatchNorm that alone reads it, or None.
        epsilon: What that BatchNorm adds to the variance.
        output: The operation whose result is to be what the sources make: the map, or its BatchNorm.
        added: The sum that alone reads the output, and the operation it is added to; None where there is none.
        path: Movements between the output and the sum, in order.
        parameters: All parameters of a recurrent layer.
        groups: Groups of channels that each read their own part of the input.
    """

    kind: str
    node: str
    source: str
    weight: str
    bias: str | None = None
    norm: tuple[str | None, str | None, str, str] | None = None
    epsilon: float = 0.0
    output: str = ""
    added: tuple[str, str] | None = None
    path: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    groups: int = 1

    @property
    def output_axis(self) -> int:
        """The weight's axis of outputs."""
        return 1 if self.kind == TRANSPOSED else 0

    @property
    def values_axis(self) -> int:
        """The axis of its neurons in what it reads and makes."""
        return 1 if self.kind in (CONVOLUTION, TRANSPOSED) else -1

    @property
    def has_shift(self) -> bool:
        """Whether its outputs may be shifted, by its bias or by the BatchNorm behind it."""
        return (self.bias if self.norm is None else self.norm[1]) is not None

    @property
    def is_plain(self) -> bool:
        """Whether every output reads every input, by rows of the weight."""
        return self.kind in (LINEAR, CONVOLUTION) and self.groups == 1


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
        found = [one for node in self.program.graph.nodes if (one := self._map(node)) is not None]
        counts: dict[str, int] = {}
        for one in found:
            for name in one.parameters or (one.weight,):
                counts[name] = counts.get(name, 0) + 1
        return [one for one in found if all(counts[name] == 1 for name in one.parameters or (one.weight,))]

    def _map(self, node: fx.Node) -> LinearMap | None:
        if node.op != "call_function":
            return None
        operation = operation_name(node)
        if operation == "aten.linear":
            return self._linear(node, "input", self._only(node, "weight"), LINEAR)
        if operation == "aten.addmm":
            return self._addmm(node)
        if operation in (*_CONVOLUTIONS, *_TRANSPOSED):
            is_transposed = operation in _TRANSPOSED or named_arguments(node).get("transposed", False)
            kind = TRANSPOSED if is_transposed else CONVOLUTION
            return self._linear(node, "input", self._only(node, "weight"), kind)
        if operation in _RECURRENT:
            return self._recurrent(node)
        return None

    def _only(self, node: fx.Node, argument: str) -> str | None:
        """Returns the parameter that an argument is, if nothing else reads it."""
        value = named_arguments(node).get(argument)
        name = self.names.get(value) if isinstance(value, fx.Node) else None
        return name if name is not None and len(value.users) == 1 else None  # type: ignore[union-attr]

    def _linear(self, node: fx.Node, reads: str, weight: str | None, kind: str) -> LinearMap | None:
        arguments = named_arguments(node)
        source, bias = arguments[reads], arguments.get("bias")
        if weight is None or not isinstance(source, fx.Node):
            return None
        is_shared = bias is not None and self._only(node, "bias") is None
        groups = int(arguments.get("groups", 1))
        # The outputs of a transposed convolution with groups stand on no single axis of its weight.
        if is_shared or (kind == TRANSPOSED and groups > 1):
            return None
        norm, epsilon, end = self._norm_of(node)
        path, total, other = self._sum_of(end)
        return LinearMap(
            kind, node.name, source.name, weight, None if bias is None else self.names[bias], norm, epsilon, end.name,
            None if total is None or other is None else (total.name, other.name), tuple(step.name for step in path),
            groups=groups,
        )  # fmt: skip

    def _addmm(self, node: fx.Node) -> LinearMap | None:
        """``input @ weight.T + bias`` as a front end may write a linear layer."""
        turned = named_arguments(node)["mat2"]
        if not isinstance(turned, fx.Node) or operation_name(turned) not in ("aten.t", "aten.transpose"):
            return None
        weight = self._only(turned, "self")
        bias = self._only(node, "self")
        if weight is None or bias is None or len(turned.users) != 1:
            return None
        source = named_arguments(node)["mat1"]
        norm, epsilon, end = self._norm_of(node)
        path, total, other = self._sum_of(end)
        return LinearMap(
            LINEAR, node.name, source.name, weight, bias, norm, epsilon, end.name,
            None if total is None or other is None else (total.name, other.name), tuple(step.name for step in path),
        )  # fmt: skip

    def _recurrent(self, node: fx.Node) -> LinearMap | None:
        arguments = named_arguments(node)
        source = arguments.get("input")
        names = [self.names.get(value) for value in arguments["params"]]
        if source is None or any(name is None for name in names):
            return None
        if any(len(value.users) != 1 for value in arguments["params"]):
            return None
        return LinearMap(
            RECURRENT, node.name, source.name, str(names[0]), output=node.name, parameters=tuple(map(str, names))
        )

    def _norm_of(self, node: fx.Node) -> tuple[tuple[str | None, str | None, str, str] | None, float, fx.Node]:
        """Returns the BatchNorm that alone reads a map: names, epsilon, and the operation that is its result."""
        users = list(node.users)
        if len(users) != 1 or operation_name(users[0]) not in _NORMS:
            return None, 0.0, node
        norm = users[0]
        arguments = named_arguments(norm)
        places = [arguments.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
        names = [None if place is None else self.names.get(place) for place in places]
        is_whole = all(name is not None for place, name in zip(places, names, strict=True) if place is not None)
        if not is_whole or names[2] is None or names[3] is None or arguments.get("training", False):
            return None, 0.0, node
        if any(len(place.users) != 1 for place in places if isinstance(place, fx.Node)):
            return None, 0.0, node
        end = norm
        if operation_name(norm) != "aten.batch_norm":
            results = [user for user in norm.users if user.args[1] == 0]
            if len(results) != 1:
                return None, 0.0, node
            end = results[0]
        return (names[0], names[1], names[2], names[3]), float(arguments["eps"]), end

    def _sum_of(self, node: fx.Node) -> tuple[list[fx.Node], fx.Node | None, fx.Node | None]:
        """Follows movements to a sum that alone reads them: the movements, the sum, and what is added."""
        path: list[fx.Node] = []
        while len(node.users) == 1:
            (user,) = node.users
            operation = operation_name(user)
            if operation in (*_RESHAPES, *_COPIES, *_TURNS):
                path.append(user)
                node = user
                continue
            if operation != "aten.add" or named_arguments(user).get("alpha", 1) != 1:
                break
            one, other = user.args[:2]
            second = other if one is node else one
            if not isinstance(second, fx.Node) or second is node or second in self.names:
                break
            # A sum that broadcasts has more places than the map.
            return (path, user, second) if second.meta["val"].shape == node.meta["val"].shape else (path, None, None)
        return path, None, None


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
