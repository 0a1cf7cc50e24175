"""Layers, read off the names and shapes of their tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mergekit_ot import ArchitectureError

Shapes = Mapping[str, tuple[int, ...]]

LINEAR, CONVOLUTION, EMBEDDING, NORM = "linear layer", "convolution", "embedding", "BatchNorm"
# By the blocks of rows in a recurrent weight.
RECURRENT = {4: "LSTM", 3: "GRU", 1: "RNN"}
_RECURRENT_TENSOR = re.compile(r"(weight_ih|weight_hh|bias_ih|bias_hh|weight_hr)_l(\d+)(_reverse)?")
COUNTER = "num_batches_tracked"
_STATISTICS = {"running_mean", "running_var"}
_AXES_OF_A_CONVOLUTION = (3, 4, 5)


@dataclass(frozen=True)
class Layer:
    """One layer of a file.

    Attributes:
        path: The name of its module.
        kind: What it is: a constant of this module, or one of `RECURRENT`.
        inputs: Width of what it reads; of an embedding, how many tokens there are.
        outputs: Width of what it gives.
        kernel: Of a convolution.
        has_bias: Whether it has biases; of a norm, a scale and a shift.
        depth: Recurrent layers on top of each other.
        is_both_ways: Whether a recurrent layer reads backwards too.
    """

    path: str
    kind: str
    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()
    has_bias: bool = True
    depth: int = 1
    is_both_ways: bool = False

    @property
    def is_recurrent(self) -> bool:
        """Whether it is an LSTM, a GRU or an RNN."""
        return self.kind in RECURRENT.values()


def read_layers(shapes: Shapes) -> list[Layer]:
    """Returns the layers of a file in its order.

    Raises:
        ArchitectureError: A tensor belongs to no layer that is known by its names and shapes.

    Example:
        >>> (layer,) = read_layers({"fc.weight": (3, 4), "fc.bias": (3,)})
        >>> layer.path, layer.kind, layer.inputs, layer.outputs
        ('fc', 'linear layer', 4, 3)
    """
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        path, _, last = name.rpartition(".")
        if last != COUNTER:
            modules.setdefault(path, {})[last] = shape
    if not modules or "" in modules:
        raise ArchitectureError("Its tensors belong to no layers with names, such as fc1.weight.")
    return [_layer(path, tensors) for path, tensors in modules.items()]


def _layer(path: str, tensors: dict[str, tuple[int, ...]]) -> Layer:
    names = set(tensors)
    if any(_RECURRENT_TENSOR.fullmatch(name) for name in names):
        return _recurrent(path, tensors)
    if names >= _STATISTICS:
        return _norm(path, tensors)
    weight = tensors.get("weight")
    if weight is None or names - {"weight", "bias"}:
        odd = min(names - {"weight", "bias"}, default="bias")
        raise ArchitectureError(f"'{path}.{odd}' belongs to no layer whose kind its names tell.")
    if len(weight) == 1:
        raise ArchitectureError(
            f"'{path}' scales its inputs one by one: a LayerNorm, a GroupNorm or a PReLU, which the file does not tell."
        )
    if len(weight) not in (2, *_AXES_OF_A_CONVOLUTION) or tensors.get("bias", weight[:1]) != weight[:1]:
        raise ArchitectureError(f"'{path}' is no linear layer and no convolution: its tensors are {tensors}.")
    kind = LINEAR if len(weight) == 2 else CONVOLUTION
    return Layer(path, kind, weight[1], weight[0], weight[2:], "bias" in names)


def _norm(path: str, tensors: dict[str, tuple[int, ...]]) -> Layer:
    shape = tensors["running_mean"]
    names = set(tensors) - _STATISTICS
    if len(shape) != 1 or set(tensors.values()) != {shape} or names not in (set(), {"weight", "bias"}):
        raise ArchitectureError(f"'{path}' is no BatchNorm that is known: its tensors are {tensors}.")
    return Layer(path, NORM, shape[0], shape[0], has_bias=bool(names))


def _recurrent(path: str, tensors: dict[str, tuple[int, ...]]) -> Layer:
    rows = tensors.get("weight_hh_l0", (0, 0))
    gates = rows[0] // rows[1] if len(rows) == 2 and rows[1] else 0
    first = tensors.get("weight_ih_l0", ())
    if gates not in RECURRENT or rows[0] != gates * rows[1] or len(first) != 2:
        raise ArchitectureError(f"'{path}' is no LSTM, GRU or RNN as torch has them (one with a projection is none).")
    hidden, depth = rows[1], sum(re.fullmatch(r"weight_hh_l\d+", name) is not None for name in tensors)
    is_both_ways, has_bias = "weight_hh_l0_reverse" in tensors, "bias_ih_l0" in tensors
    layer = Layer(path, RECURRENT[gates], first[1], hidden * (1 + is_both_ways), (), has_bias, depth, is_both_ways)
    if _recurrent_shapes(layer, hidden, gates) != tensors:
        raise ArchitectureError(f"'{path}' is no {layer.kind} as torch has them: its tensors are {tensors}.")
    return layer


def _recurrent_shapes(layer: Layer, hidden: int, gates: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(layer.depth):
        for way in ("", "_reverse") if layer.is_both_ways else ("",):
            end, inputs = f"l{number}{way}", layer.outputs if number else layer.inputs
            shapes |= {f"weight_ih_{end}": (gates * hidden, inputs), f"weight_hh_{end}": (gates * hidden, hidden)}
            if layer.has_bias:
                shapes |= {f"bias_ih_{end}": (gates * hidden,), f"bias_hh_{end}": (gates * hidden,)}
    return shapes
