"""A network that has the tensors of a chain under their names, and runs its layers in order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergeot_chains.layers import CONVOLUTION, EMBEDDING, LINEAR, NORM, Layer

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "leaky_relu": nn.functional.leaky_relu,
    "elu": nn.functional.elu,
    "none": lambda values: values,
}
_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_POOLINGS: dict[int, Callable[..., Tensor]] = {
    1: nn.functional.adaptive_avg_pool1d,
    2: nn.functional.adaptive_avg_pool2d,
    3: nn.functional.adaptive_avg_pool3d,
}
_RECURRENT = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}


@dataclass(frozen=True)
class Flattening:
    """Channels with places become one row of numbers, channel by channel.

    Attributes:
        places: So many of each channel, along every axis.
    """

    places: tuple[int, ...]

    def run(self, values: Tensor) -> Tensor:
        """Pools to so many places and returns one row per sample."""
        axes = len(self.places)
        return _POOLINGS[axes](values, self.places if axes > 1 else math.prod(self.places)).flatten(1)


@dataclass(frozen=True)
class Activation:
    """A function of each number by itself."""

    name: str


@dataclass(frozen=True)
class LastStep:
    """Of the steps of a recurrent layer, the last one is read."""


Stage = Layer | Flattening | Activation | LastStep


class Chain(nn.Module):
    """Runs layers in order.

    Args:
        stages: The layers, and what stands between them.

    Example:
        >>> first, second = Layer("net.0", LINEAR, 4, 8), Layer("net.2", LINEAR, 8, 2)
        >>> list(Chain((first, Activation("relu"), second)).state_dict())
        ['net.0.weight', 'net.0.bias', 'net.2.weight', 'net.2.bias']
    """

    def __init__(self, stages: tuple[Stage, ...]) -> None:
        super().__init__()
        self.stages = stages
        layers = [stage for stage in stages if isinstance(stage, Layer)]
        # Where steps are read, the numbers of one step are the last axis.
        self.reads_rows = all(layer.kind in (LINEAR, NORM) for layer in layers)
        places = 0
        for stage, following in itertools.zip_longest(stages, stages[1:]):
            if isinstance(stage, Layer):
                places = len(stage.kernel) or (0 if stage.kind != NORM else places)
                ahead = following.kernel if isinstance(following, Layer) and stage.kind == NORM else ()
                self._add(stage.path, _module(stage, places or len(ahead)))
            elif isinstance(stage, Flattening):
                places = 0

    def _add(self, path: str, module: nn.Module) -> None:
        *parents, last = path.split(".")
        place: nn.Module = self
        for parent in parents:
            if parent not in dict(place.named_children()):
                place.add_module(parent, nn.Module())
            place = place.get_submodule(parent)
        place.add_module(last, module)

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns what the last layer gives."""
        values = inputs.flatten(1) if self.reads_rows else inputs
        for stage in self.stages:
            match stage:
                case Flattening():
                    values = stage.run(values)
                case Activation(name):
                    values = ACTIVATIONS[name](values)
                case LastStep():
                    values = values[:, -1]
                case Layer():
                    values = self._run(stage, values)
        return values

    def _run(self, layer: Layer, values: Tensor) -> Tensor:
        module = self.get_submodule(layer.path)
        if layer.is_recurrent:
            # Torch takes two axes for one sequence without a batch.
            if values.dim() != 3:
                raise ValueError(f"'{layer.path}' reads (batch, step, feature), not {tuple(values.shape)}")
            return module(values)[0]
        return module(values)


def _module(layer: Layer, places: int) -> nn.Module:
    if layer.is_recurrent:
        hidden = layer.outputs // (1 + layer.is_both_ways)
        return _RECURRENT[layer.kind](
            layer.inputs,
            hidden,
            layer.depth,
            bias=layer.has_bias,
            batch_first=True,
            bidirectional=layer.is_both_ways,
        )
    if layer.kind == EMBEDDING:
        return nn.Embedding(layer.inputs, layer.outputs)
    if layer.kind == NORM:
        return _NORMS[places](layer.outputs, affine=layer.has_bias)
    if layer.kind == CONVOLUTION:
        # Padded, so that whatever size an image has, something is left of it.
        padding = tuple(size // 2 for size in layer.kernel)
        kind = _CONVOLUTIONS[len(layer.kernel)]
        return kind(layer.inputs, layer.outputs, layer.kernel, padding=padding, bias=layer.has_bias)
    return nn.Linear(layer.inputs, layer.outputs, layer.has_bias)
