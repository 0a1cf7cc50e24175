"""Residual networks for small images: with BatchNorm and shortcuts without parameters, or without normalisation."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mergeot_zoo.sizes import positive

Images = Float[Tensor, "batch channel height width"]


class Block(nn.Module):
    """Two convolutions and a shortcut; where the stream widens, the shortcut drops pixels and pads channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.missing = outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, images: Images) -> Images:
        """Returns the stream after the block."""
        branch = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(images)))))
        return torch.relu(branch + self._shortcut(images))

    def _shortcut(self, images: Images) -> Images:
        if self.stride > 1:
            images = images[:, :, :: self.stride, :: self.stride]
        if self.missing:
            before = self.missing // 2
            images = functional.pad(images, (0, 0, 0, 0, before, self.missing - before))
        return images


class PlainBlock(nn.Module):
    """Two convolutions without normalisation, and a shortcut that is a convolution where the stream changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        # Without normalisation a deep network can be trained from branches that start at nothing.
        nn.init.zeros_(self.conv2.weight)
        changes = stride > 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else nn.Identity()

    def forward(self, images: Images) -> Images:
        """Returns the stream after the block."""
        return torch.relu(self.conv2(torch.relu(self.conv1(images))) + self.shortcut(images))


class PlainResidualNetwork(nn.Module):
    """A stem, four stages of two blocks without normalisation, the mean over the image and a linear layer."""

    def __init__(self, width: int, classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        sizes = [width, width, 2 * width, 4 * width, 8 * width]
        for number, (inputs, outputs) in enumerate(pairwise(sizes), start=1):
            first = PlainBlock(inputs, outputs, 1 if number == 1 else 2)
            self.add_module(f"layer{number}", nn.Sequential(first, PlainBlock(outputs, outputs, 1)))
        self.linear = nn.Linear(sizes[-1], classes, bias=False)

    def forward(self, images: Images) -> Float[Tensor, "batch output"]:
        """Returns the class scores."""
        stream = torch.relu(self.conv1(images))
        for number in range(1, 5):
            stream = self.get_submodule(f"layer{number}")(stream)
        return self.linear(stream.mean((2, 3)))


class ResidualNetwork(nn.Module):
    """A stem, three stages of blocks, the mean over the image and a linear layer."""

    def __init__(self, blocks: int, width: int, classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, images: Images) -> Float[Tensor, "batch output"]:
        """Returns the class scores."""
        stream = torch.relu(self.bn1(self.conv1(images)))
        stream = self.layer3(self.layer2(self.layer1(stream)))
        return self.linear(stream.mean((2, 3)))


def resnet20(width: int = 16, classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Builds ResNet-20 for small images: ``conv1``, ``bn1``, ``layer1.0.conv1`` …, ``linear``.

    Args:
        width: Neurons of the first stage; the others have 2 and 4 times as many.
        classes: Outputs.
        in_channels: Channels of an image.

    Raises:
        ArchitectureError: A size is not a positive integer.
    """
    return _residual(3, width, classes, in_channels)


def resnet56(width: int = 16, classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Builds ResNet-56: `resnet20` with nine blocks in a stage, of the same arguments."""
    return _residual(9, width, classes, in_channels)


def resnet18(width: int = 64, classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Builds ResNet-18 for small images without normalisation and biases, as in arXiv:1910.05653 and arXiv:2210.06671.

    Args:
        width: Neurons of the first stage; the others have 2, 4 and 8 times as many.
        classes: Outputs.
        in_channels: Channels of an image.

    Raises:
        ArchitectureError: A size is not a positive integer.
    """
    sizes = (positive(width, "width"), positive(classes, "classes"), positive(in_channels, "in_channels"))
    return PlainResidualNetwork(*sizes)


def _residual(blocks: int, width: int, classes: int, in_channels: int) -> nn.Module:
    sizes = (positive(width, "width"), positive(classes, "classes"), positive(in_channels, "in_channels"))
    return ResidualNetwork(blocks, *sizes)


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(inputs, outputs, stride)
    return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))
