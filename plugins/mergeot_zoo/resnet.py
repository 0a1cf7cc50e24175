"""The residual network of 20 layers for CIFAR (arXiv:1512.03385, section 4.2), with shortcuts without parameters."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mergeot_zoo.sizes import read_sizes

_BLOCKS = 3


class Block(nn.Module):
    """Two convolutions and a shortcut; where the size changes, the shortcut takes every other pixel and pads channels.

    Args:
        before: Channels of the input.
        after: Channels of the output.
        stride: Stride of the first convolution.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self._stride = stride
        left = (after - before) // 2
        self._padding = (left, after - before - left)

    def forward(self, inputs: Float[Tensor, "batch before h w"]) -> Float[Tensor, "batch after h2 w2"]:
        """Returns the block's output."""
        values = functional.relu(self.bn1(self.conv1(inputs)))
        values = self.bn2(self.conv2(values))
        shortcut = inputs
        if self._stride != 1:
            shortcut = functional.pad(inputs[:, :, :: self._stride, :: self._stride], (0, 0, 0, 0, *self._padding))
        return functional.relu(values + shortcut)


class ResNet(nn.Module):
    """``conv1``, ``bn1``, ``layer1`` to ``layer3`` of three blocks each, and ``linear``."""

    def __init__(self, width: int, classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, 1)
        self.layer2 = _stage(width, 2 * width, 2)
        self.layer3 = _stage(2 * width, 4 * width, 2)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, inputs: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Returns the logits."""
        values = functional.relu(self.bn1(self.conv1(inputs)))
        values = self.layer3(self.layer2(self.layer1(values)))
        return self.linear(functional.adaptive_avg_pool2d(values, 1).flatten(1))


def _stage(before: int, after: int, stride: int) -> nn.Sequential:
    rest = (Block(after, after, 1) for _ in range(_BLOCKS - 1))
    return nn.Sequential(Block(before, after, stride), *rest)


def resnet20(width: int = 16, classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Builds ResNet-20: keys ``conv1.weight``, ``layer1.0.conv1.weight`` … ``linear.weight``.

    Args:
        width: Channels of the first stage; the third has four times as many.
        classes: Outputs.
        in_channels: Channels of the input.

    Raises:
        ArchitectureError: The width is no positive integer.
    """
    (size,) = read_sizes(width, "width")[:1]
    return ResNet(size, classes, in_channels)
