"""Networks without shortcuts: a multilayer perceptron, a small convolutional network and VGG11."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergekit_ot.errors import ArchitectureError, unknown_name
from mergeot_zoo.sizes import parse_sizes, positive

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
}
# Channels of VGG11's eight convolutions as multiples of the first; None stands for a pooling.
_VGG11 = (1, None, 2, None, 4, 4, None, 8, 8, None, 8, 8, None)


class MultilayerPerceptron(nn.Module):
    """Linear layers ``fc1`` … with an activation between them, on flattened inputs."""

    def __init__(self, sizes: tuple[int, ...], bias: bool, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.names = tuple(f"fc{number}" for number in range(1, len(sizes)))
        self.activation = activation
        for name, (inputs, outputs) in zip(self.names, pairwise(sizes), strict=True):
            self.add_module(name, nn.Linear(inputs, outputs, bias))

    def forward(self, inputs: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch output"]:
        """Returns the last layer's outputs."""
        values = inputs.flatten(1)
        for name in self.names[:-1]:
            values = self.activation(self.get_submodule(name)(values))
        return self.get_submodule(self.names[-1])(values)


class ConvolutionalNetwork(nn.Module):
    """Blocks of convolution, optional BatchNorm, ReLU and pooling, then two linear layers."""

    def __init__(
        self,
        channels: tuple[int, ...],
        hidden: int,
        classes: int,
        in_channels: int,
        image: int,
        bias: bool,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        self.depth = len(channels)
        self.has_norm = batch_norm
        for number, (inputs, outputs) in enumerate(pairwise((in_channels, *channels)), start=1):
            self.add_module(f"conv{number}", nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias))
            if batch_norm:
                self.add_module(f"bn{number}", nn.BatchNorm2d(outputs))
        side = image // 2**self.depth
        self.fc1 = nn.Linear(channels[-1] * side * side, hidden, bias)
        self.fc2 = nn.Linear(hidden, classes, bias)

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch output"]:
        """Returns the class scores."""
        values = images
        for number in range(1, self.depth + 1):
            values = self.get_submodule(f"conv{number}")(values)
            if self.has_norm:
                values = self.get_submodule(f"bn{number}")(values)
            values = nn.functional.max_pool2d(torch.relu(values), 2)
        return self.fc2(torch.relu(self.fc1(values.flatten(1))))


class Vgg(nn.Module):
    """Convolutions and poolings in ``features``, linear layers in ``classifier``."""

    def __init__(self, features: list[nn.Module], classifier: nn.Module) -> None:
        super().__init__()
        self.features = nn.Sequential(*features)
        self.classifier = classifier

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch output"]:
        """Returns the class scores."""
        return self.classifier(self.features(images).flatten(1))


def mlp(
    sizes: str | Sequence[int] = (784, 400, 200, 100, 10), bias: bool = True, activation: str = "relu"
) -> nn.Module:
    """Builds a multilayer perceptron with layers ``fc1``, ``fc2`` …; inputs are flattened.

    Args:
        sizes: Inputs, hidden neurons of each layer, outputs; ``64-64-10`` in a SPEC.
        bias: Whether the layers have biases.
        activation: relu, tanh, gelu or silu.

    Raises:
        ArchitectureError: The sizes or the activation cannot be used.
    """
    if activation not in _ACTIVATIONS:
        raise ArchitectureError(unknown_name("activation", activation, _ACTIVATIONS))
    return MultilayerPerceptron(parse_sizes(sizes, "sizes", at_least=2), bias, _ACTIVATIONS[activation])


def cnn(
    channels: str | int | Sequence[int] = (16, 32),
    hidden: int = 64,
    classes: int = 10,
    in_channels: int = 1,
    image: int = 28,
    bias: bool = True,
    batch_norm: bool = False,
) -> nn.Module:
    """Builds a small convolutional network: ``conv1`` …, each halving the image, then ``fc1`` and ``fc2``.

    Args:
        channels: Neurons of each convolution; ``16-32`` in a SPEC.
        hidden: Neurons of the hidden linear layer.
        classes: Outputs.
        in_channels: Channels of an image.
        image: Height and width of an image.
        bias: Whether the layers have biases.
        batch_norm: Whether a BatchNorm ``bn1`` … follows each convolution.

    Raises:
        ArchitectureError: A size cannot be used, or the image is too small to be halved that often.
    """
    numbers = parse_sizes(channels, "channels", at_least=1)
    if positive(image, "image") < 2 ** len(numbers):
        raise ArchitectureError(
            f"An image of {image} pixels cannot be halved {len(numbers)} times. "
            f"Give image={2 ** len(numbers)} or more, or fewer channels."
        )
    return ConvolutionalNetwork(
        numbers,
        positive(hidden, "hidden"),
        positive(classes, "classes"),
        positive(in_channels, "in_channels"),
        image,
        bias,
        batch_norm,
    )


def vgg11(
    width: int = 64,
    classes: int = 10,
    in_channels: int = 3,
    image: int = 32,
    bias: bool = True,
    batch_norm: bool = False,
    hidden: int = 0,
) -> nn.Module:
    """Builds VGG11 for small images, with one linear layer behind the convolutions or three; arXiv:1409.1556.

    Args:
        width: Neurons of the first convolution; the others have 2, 4, 8 and 8 times as many.
        classes: Outputs.
        in_channels: Channels of an image.
        image: Height and width of an image; it is halved up to five times, down to one pixel.
        bias: Whether the layers have biases.
        batch_norm: Whether a BatchNorm follows each convolution.
        hidden: Neurons of each of two hidden linear layers; 0 for none.

    Raises:
        ArchitectureError: A size is not a positive integer.
    """
    channels, side = positive(in_channels, "in_channels"), positive(image, "image")
    features: list[nn.Module] = []
    for factor in _VGG11:
        if factor is None:
            if side > 1:
                features.append(nn.MaxPool2d(2))
                side //= 2
            continue
        outputs = factor * positive(width, "width")
        features.append(nn.Conv2d(channels, outputs, 3, padding=1, bias=bias))
        if batch_norm:
            features.append(nn.BatchNorm2d(outputs))
        features.append(nn.ReLU())
        channels = outputs
    sizes = [
        channels * side * side,
        *([positive(hidden, "hidden")] * 2 if hidden else []),
        positive(classes, "classes"),
    ]
    linear = [nn.Linear(inputs, outputs, bias) for inputs, outputs in pairwise(sizes)]
    if not hidden:
        return Vgg(features, linear[0])
    return Vgg(features, nn.Sequential(linear[0], nn.ReLU(), linear[1], nn.ReLU(), linear[2]))
