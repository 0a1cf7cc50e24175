"""Feed-forward networks without shortcuts, built from plain data."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mergekit_ot import ArchitectureError
from mergeot_zoo.sizes import Sizes, read_sizes

# Channels in multiples of the width; 0 is a pooling layer (VGG configuration A, arXiv:1409.1556).
_VGG11 = (1, 0, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8, 0)


class Mlp(nn.Module):
    """Linear layers ``fc1``, ``fc2`` … with ReLU between them; the input is flattened first."""

    def __init__(self, sizes: tuple[int, ...], bias: bool) -> None:
        super().__init__()
        self._names = tuple(f"fc{index}" for index in range(1, len(sizes)))
        for name, before, after in zip(self._names, sizes, sizes[1:], strict=False):
            self.add_module(name, nn.Linear(before, after, bias=bias))

    def forward(self, inputs: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Returns the logits."""
        values = inputs.flatten(1)
        for name in self._names[:-1]:
            values = functional.relu(self.get_submodule(name)(values))
        return self.get_submodule(self._names[-1])(values)


class ConvNet(nn.Module):
    """Convolutions ``conv1``, ``conv2`` … of 3 × 3, pooling where told, then ``fc1`` and ``fc2``.

    Args:
        plan: Channels of each convolution; 0 stands for a pooling layer that halves the image.
        in_channels: Channels of the input.
        image: Height and width of the input.
        hidden: Neurons of ``fc1``.
        classes: Outputs.
        bias: Whether convolutions and linear layers have one.
        batch_norm: Whether a BatchNorm ``bn1``, ``bn2`` … follows each convolution.

    Raises:
        ArchitectureError: The image is too small for the pooling layers.
    """

    def __init__(
        self, plan: tuple[int, ...], in_channels: int, image: int, hidden: int, classes: int, bias: bool,
        batch_norm: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        smallest = 2 ** plan.count(0)
        if image < smallest:
            raise ArchitectureError(
                f"image={image} is too small: this network halves it {plan.count(0)} times. Use {smallest} or more."
            )
        self._layers: list[tuple[str, str] | None] = []
        channels, count = in_channels, 0
        for size in plan:
            if size == 0:
                self._layers.append(None)
                continue
            count += 1
            self.add_module(f"conv{count}", nn.Conv2d(channels, size, 3, padding=1, bias=bias))
            self.add_module(f"bn{count}", nn.BatchNorm2d(size) if batch_norm else nn.Identity())
            self._layers.append((f"conv{count}", f"bn{count}"))
            channels = size
        self.fc1 = nn.Linear(channels * (image // smallest) ** 2, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, classes, bias=bias)

    def forward(self, inputs: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Returns the logits."""
        values = inputs
        for layer in self._layers:
            if layer is None:
                values = functional.max_pool2d(values, 2)
            else:
                convolution, norm = map(self.get_submodule, layer)
                values = functional.relu(norm(convolution(values)))
        return self.fc2(functional.relu(self.fc1(values.flatten(1))))


def mlp(sizes: Sizes = "784-400-200-100-10", bias: bool = True) -> nn.Module:
    """Builds a multi-layer perceptron; its keys are ``fc1.weight``, ``fc2.weight`` and so on.

    Args:
        sizes: Inputs, neurons of every hidden layer, outputs: ``"64-32-10"`` or a sequence.
        bias: Whether the layers have one.

    Raises:
        ArchitectureError: There are fewer than two sizes, or they are no positive integers.

    Example:
        >>> list(mlp("4-3-2", bias=False).state_dict())
        ['fc1.weight', 'fc2.weight']
    """
    return Mlp(read_sizes(sizes, "sizes", 2), bias)


def cnn(
    channels: Sizes = "16-32", hidden: int = 64, classes: int = 10, in_channels: int = 1, image: int = 8
) -> nn.Module:
    """Builds a small convolutional network: every convolution is followed by ReLU and pooling.

    Args:
        channels: Channels of the convolutions ``conv1``, ``conv2`` …: ``"16-32"`` or a sequence.
        hidden: Neurons of the linear layer ``fc1``.
        classes: Outputs of ``fc2``.
        in_channels: Channels of the input.
        image: Height and width of the input.

    Raises:
        ArchitectureError: The channels are no positive integers, or the image is too small.
    """
    plan = tuple(number for size in read_sizes(channels, "channels") for number in (size, 0))
    return ConvNet(plan, in_channels, image, hidden, classes, bias=True)


def vgg11(
    width: int = 64, classes: int = 10, in_channels: int = 3, image: int = 32, bias: bool = True,
    batch_norm: bool = False,
) -> nn.Module:  # fmt: skip
    """Builds VGG-11 (arXiv:1409.1556) for small images: ``conv1`` to ``conv8``, then ``fc1`` and ``fc2``.

    Args:
        width: Channels of the first convolution; the last has eight times as many.
        classes: Outputs.
        in_channels: Channels of the input.
        image: Height and width of the input, 32 or more.
        bias: Whether the layers have one.
        batch_norm: Whether a BatchNorm follows each convolution.

    Raises:
        ArchitectureError: The width is no positive integer, or the image is too small.
    """
    (size,) = read_sizes(width, "width")[:1]
    plan = tuple(multiple * size for multiple in _VGG11)
    return ConvNet(plan, in_channels, image, 8 * size, classes, bias, batch_norm)
