"""Convolutions in groups: their norms, their multipliers, and shuffles between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures.base import Sample, images


def shuffled(x: Tensor, groups: int) -> Tensor:
    """Returns the channels with the index of the group last."""
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)


class DepthwiseMultiplier(nn.Module):
    """A depthwise convolution with two outputs per channel, and one on top with three outputs for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3)
        self.twice = nn.Conv2d(4, 8, 3, padding=1, groups=4)
        self.thrice = nn.Conv2d(8, 24, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(24, 7, 1)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.elu(self.thrice(F.elu(self.twice(F.elu(self.stem(x))))))
        return self.head(F.elu(self.pointwise(x)).mean((2, 3)))


class Resnext(nn.Module):
    """A bottleneck with a grouped convolution, InstanceNorm before it and GroupNorm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 7, 3, padding=1)
        self.reduce = nn.Conv2d(7, 12, 1, bias=False)
        self.norm1 = nn.InstanceNorm2d(12, affine=True)
        self.grouped = nn.Conv2d(12, 15, 3, padding=1, groups=3, bias=False)
        self.norm2 = nn.GroupNorm(3, 15)
        self.expand = nn.Conv2d(15, 7, 1)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.norm1(self.reduce(x)))
        y = self.expand(F.relu(self.norm2(self.grouped(y))))
        return self.head(F.relu(x + y).mean((2, 3)))


class IncompatibleGroups(nn.Module):
    """GroupNorm cuts twelve channels in three, and the convolution behind it cuts them in four."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 12, 3)
        self.norm = nn.GroupNorm(3, 12)
        self.grouped = nn.Conv2d(12, 20, 3, groups=4)
        self.head = nn.Linear(20, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.grouped(F.relu(self.norm(self.first(x))))).mean((2, 3)))


class ShufflenetV1(nn.Module):
    """Grouped 1x1 convolutions with a channel shuffle in between; the shortcut is added, or pooled and concatenated."""

    def __init__(self, adds: bool) -> None:
        super().__init__()
        self.adds = adds
        self.stem = nn.Conv2d(2, 12, 3, padding=1)
        self.squeeze = nn.Conv2d(12, 18, 1, groups=3, bias=False)
        self.norm1 = nn.BatchNorm2d(18)
        self.depthwise = nn.Conv2d(18, 18, 3, 1 if adds else 2, 1, groups=18, bias=False)
        self.norm2 = nn.BatchNorm2d(18)
        self.expand = nn.Conv2d(18, 12 if adds else 15, 1, groups=3, bias=False)
        self.norm3 = nn.BatchNorm2d(12 if adds else 15)
        self.head = nn.Linear(12 if adds else 27, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = shuffled(F.relu(self.norm1(self.squeeze(x))), 3)
        y = self.norm3(self.expand(self.norm2(self.depthwise(y))))
        x = F.relu(x + y) if self.adds else F.relu(torch.cat([F.avg_pool2d(x, 3, 2, 1), y], 1))
        return self.head(x.mean((2, 3)))


def _pointwise(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True))


def _depthwise(width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False), nn.BatchNorm2d(width))


class ShufflenetV2(nn.Module):
    """A unit that halves the picture, then one that keeps half of the channels; both end in a shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.down1 = nn.Sequential(_depthwise(5, 2), _pointwise(5, 6))
        self.down2 = nn.Sequential(_pointwise(5, 7), _depthwise(7, 2), _pointwise(7, 6))
        self.branch = nn.Sequential(_pointwise(6, 8), _depthwise(8, 1), _pointwise(8, 6))
        self.last = _pointwise(12, 9)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = shuffled(torch.cat((self.down1(x), self.down2(x)), dim=1), 2)
        kept, rest = x.chunk(2, dim=1)
        x = shuffled(torch.cat((kept, self.branch(rest)), dim=1), 2)
        return self.head(self.last(x).mean([2, 3]))


GROUPED: dict[str, Sample] = {
    # The 4 channels, two copies of each, three copies of each of those 8, and the pointwise channels: 4 groups,
    # 1 + 4 + 8 + 1 = 14 orders.
    "depthwise_multiplier": Sample(DepthwiseMultiplier, images(2)),
    # The stream, the 3 groups, and inside each of them what goes in and what comes out: 4 groups, 8 orders.
    "resnext": Sample(Resnext, images(2)),
    # The cuts at 4, 8 and at 3, 6, 9 leave the stretches 0-2, 3, 4-5, 6-7, 8, 9-11: four with an order. Inside each of
    # the 4 groups, which stay, the 5 outputs: 5 groups, 8 orders (1 and 4 where layouts know no stretches of factors).
    "incompatible_groups": Sample(IncompatibleGroups, images(2)),
    # The 3 groups read are the 3 groups made, since both are added. Inside each 4 channels; and for each pair of a
    # group that is read and one that is made 2 channels in the middle: 3 groups, 1 + 3 + 9 = 13 orders.
    "shufflenet_v1": Sample(lambda: ShufflenetV1(adds=True), images(2)),
    # The 3 groups that are read and the 3 that are made, the 4 and 5 channels inside each, and 2 in the middle for each
    # pair: 5 groups, 1 + 1 + 3 + 3 + 9 = 17 orders.
    "shufflenet_v1_concatenated": Sample(lambda: ShufflenetV1(adds=False), images(2)),
    # The stem, the insides of both units, the outputs of the second and the last layer; both sides of the first unit
    # make 6 outputs, of which 3 are kept and 3 go on: 9 groups, 9 orders.
    "shufflenet_v2": Sample(ShufflenetV2, images(3)),
}
