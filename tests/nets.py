"""The networks that the laws are tested on, each with its freedom counted by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Net:
    """An architecture, an input for it, and how many groups (families counted once per member) it has."""

    make: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    groups: int
    families: int


class Mlp(nn.Module):
    def __init__(self, sizes: tuple[int, ...] = (6, 8, 5, 3), bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, bias) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)


class Cnn(nn.Module):
    """Convolutions with BatchNorm, pooling and a flatten into a linear layer."""

    def __init__(self, first: int = 6, second: int = 8, hidden: int = 7) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, first, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(second)
        self.fc1 = nn.Linear(second * 4, hidden)
        self.fc2 = nn.Linear(hidden, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        return self.fc2(F.dropout(F.relu(self.fc1(x.view(x.shape[0], -1))), 0.1, self.training))


class BasicBlock(nn.Module):
    def __init__(self, width: int, out: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.down = nn.Conv2d(width, out, 1, stride, bias=False) if shortcut == "B" and stride > 1 else None
        self.padding = (out - width) // 2 if shortcut == "A" and stride > 1 else 0
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.down is not None:
            x = self.down(x)
        elif self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(x + y)


class ResNet(nn.Module):
    """Two stages of two basic blocks; shortcut "A" pads with zeros, "B" projects."""

    def __init__(self, width: int = 4, shortcut: str = "B") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stage1 = nn.Sequential(BasicBlock(width, width, 1, shortcut), BasicBlock(width, width, 1, shortcut))
        self.stage2 = nn.Sequential(
            BasicBlock(width, 2 * width, 2, shortcut), BasicBlock(2 * width, 2 * width, 1, shortcut)
        )
        self.linear = nn.Linear(2 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(F.relu(self.bn1(self.conv1(x)))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class DenseNet(nn.Module):
    """Concatenated feature maps, flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 5, 3, padding=1)
        self.grow1 = nn.Conv2d(5, 4, 3, padding=1)
        self.grow2 = nn.Conv2d(9, 3, 3, padding=1)
        self.head = nn.Linear(12 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = torch.cat([x, F.relu(self.grow1(x))], 1)
        x = torch.cat([x, F.relu(self.grow2(x))], 1)
        return self.head(F.avg_pool2d(x, 3).flatten(1))


class MobileBlock(nn.Module):
    """Pointwise, depthwise (with a multiplier of two), squeeze and excite, pointwise with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.expand = nn.Conv2d(6, 5, 1)
        self.depthwise = nn.Conv2d(5, 10, 3, padding=1, groups=5)
        self.squeeze = nn.Linear(10, 4)
        self.excite = nn.Linear(4, 10)
        self.project = nn.Conv2d(10, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        y = F.relu6(self.depthwise(F.relu6(self.expand(x))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3))))))
        return self.head((x + self.project(y * gate[:, :, None, None])).mean((2, 3)))


class Grouped(nn.Module):
    """Grouped convolution behind GroupNorm with the same number of groups."""

    def __init__(self, groups: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4 * groups, 3)
        self.norm = nn.GroupNorm(groups, 4 * groups)
        self.conv2 = nn.Conv2d(4 * groups, 5 * groups, 3, groups=groups)
        self.head = nn.Linear(5 * groups, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.conv2(F.silu(self.norm(self.conv1(x))))).amax((2, 3)))


class Shuffle(nn.Module):
    """Channel split, branch, concatenation and shuffle, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.branch1 = nn.Conv2d(4, 4, 1)
        self.branch2 = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(8, 3)

    @staticmethod
    def shuffled(x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for branch in (self.branch1, self.branch2):
            kept, rest = x.chunk(2, 1)
            x = self.shuffled(torch.cat([kept, F.relu(branch(rest))], 1))
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    """Down, up by a transposed convolution, and a skip that is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(1, 4, 3, padding=1)
        self.down2 = nn.Conv2d(4, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 5, 2, stride=2)
        self.out = nn.Conv2d(9, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.down1(x))
        x = self.up(F.relu(self.down2(F.max_pool2d(skip, 2))))
        return self.out(torch.cat([F.relu(x), skip], 1))


class ResidualMlp(nn.Module):
    """A residual stream with LayerNorm, and a gate multiplied in."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(width, 8) for _ in range(2))
        self.gate = nn.ModuleList(nn.Linear(width, 8) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(8, width) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, up, gate, down in zip(self.norms, self.up, self.gate, self.down, strict=True):
            y = norm(x)
            x = x + down(F.silu(gate(y)) * up(y))
        return self.head(x)


class Siamese(nn.Module):
    """One encoder used on two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.encoder(x) * self.encoder(y)).sum(1)


class TiedAutoencoder(nn.Module):
    """The decoder is the encoder's transposed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 8))
        self.bias = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.sigmoid(F.linear(x, self.weight, self.bias)), self.weight.t())


class Attention(nn.Module):
    """Hand-written attention with a fused query/key/value map: heads move whole, their insides on their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 12)
        self.norm = nn.LayerNorm(12)
        self.qkv = nn.Linear(12, 36)
        self.out = nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, length, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return self.head(x.mean(1))


def _images(channels: int, size: int = 8) -> tuple[Tensor, ...]:
    return (torch.randn(2, channels, size, size),)


NETS: dict[str, Net] = {
    "mlp": Net(Mlp, (torch.randn(2, 6),), 2, 2),
    "mlp_no_bias": Net(lambda: Mlp(bias=False), (torch.randn(2, 6),), 2, 2),
    "cnn": Net(Cnn, _images(1), 3, 3),
    # Residual streams: one per stage; one group inside each of the four blocks.
    "resnet_b": Net(ResNet, _images(3), 6, 6),
    # The padded shortcut cuts the second stream into new, old and new channels: stage one's group stands in it.
    "resnet_a": Net(lambda: ResNet(shortcut="A"), _images(3), 7, 7),
    "densenet": Net(DenseNet, _images(1, 6), 3, 3),
    # stem, expand, its two copies per channel (a family of 5), squeeze.
    "mobile": Net(MobileBlock, _images(3), 4, 8),
    # The three groups, and inside each: channels of conv1 and of conv2.
    "grouped": Net(Grouped, _images(2), 3, 7),
    "shuffle": Net(Shuffle, _images(3), 6, 6),
    "unet": Net(UNet, _images(1), 3, 3),
    "conv1d": Net(
        lambda: nn.Sequential(nn.Conv1d(2, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(5, 3)),
        (torch.randn(2, 2, 9),),
        1,
        1,
    ),
    "conv3d": Net(
        lambda: nn.Sequential(
            nn.Conv3d(1, 4, 2), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(32, 3)
        ),
        (torch.randn(2, 1, 5, 5, 5),),
        1,
        1,
    ),
    # The stream, and the gated hidden layer of each of two blocks.
    "residual_mlp": Net(ResidualMlp, (torch.randn(2, 4),), 3, 3),
    "siamese": Net(Siamese, (torch.randn(2, 5), torch.randn(2, 5)), 2, 2),
    "tied_autoencoder": Net(TiedAutoencoder, (torch.randn(2, 8),), 1, 1),
    # The stream, the heads, and inside each of three heads the query/key and the value/output space.
    "attention": Net(Attention, (torch.randn(2, 5, 6),), 4, 8),
}


def draw_norms(net: nn.Module) -> None:
    """Gives every BatchNorm statistics, scales and shifts that a fusion cannot overlook."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
