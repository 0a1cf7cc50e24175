"""Convolutional classifiers: plain, residual, depthwise, dense in branches, and channels-last."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures.base import Sample, images
from architectures.convolutional_generative import GENERATIVE
from architectures.convolutional_grouped import GROUPED


class Vgg(nn.Module):
    """Blocks of convolutions, and a classifier of two linear layers behind a view."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(5, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 7, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        )
        self.classifier = nn.Sequential(nn.Linear(7 * 4, 9), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(9, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x.view(x.size(0), -1))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with BatchNorm, and a shortcut that projects where the shape changes."""

    def __init__(self, width: int, inner: tuple[int, int], out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, inner[0], 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner[0])
        self.conv2 = nn.Conv2d(inner[0], inner[1], 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner[1])
        self.conv3 = nn.Conv2d(inner[1], out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample: nn.Module | None = None
        if stride > 1 or width != out:
            self.downsample = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResnetBottleneck(nn.Module):
    """A stem with pooling, a stage of one bottleneck, and a stage of two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(5)
        self.layer1 = nn.Sequential(Bottleneck(5, (3, 4), 10, 1))
        self.layer2 = nn.Sequential(Bottleneck(10, (6, 7), 14, 2), Bottleneck(14, (8, 9), 14, 1))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.fc(torch.flatten(self.avgpool(self.layer2(self.layer1(x))), 1))


class PreactivationBlock(nn.Module):
    """BatchNorm and ReLU stand before each convolution; the projection reads what was activated."""

    def __init__(self, width: int, inner: int, out: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, inner, 3, 1 if width == out else 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, out, 3, padding=1, bias=False)
        self.shortcut = None if width == out else nn.Conv2d(width, out, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + shortcut


class ResnetPreactivation(nn.Module):
    """Two stages of one preactivated block, and a BatchNorm at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(PreactivationBlock(5, 6, 5), PreactivationBlock(5, 7, 8))
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3)))


class InvertedResidual(nn.Module):
    """Expand, depthwise, squeeze and excite by convolutions, project."""

    def __init__(self, width: int, inner: int, squeeze: int, out: int) -> None:
        super().__init__()
        self.residual = width == out
        self.expand = nn.Sequential(nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.Hardswish())
        self.depthwise = nn.Sequential(
            nn.Conv2d(inner, inner, 3, 1 if self.residual else 2, 1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.Hardswish(),
        )
        self.excite = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(inner, squeeze, 1),
            nn.ReLU(),
            nn.Conv2d(squeeze, inner, 1),
            nn.Hardsigmoid(),
        )
        self.project = nn.Sequential(nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        y = self.project(self.excite(y) * y)
        return x + y if self.residual else y


class MobilenetV3(nn.Module):
    """Two inverted residuals, the first with a residual, the second with a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.Hardswish())
        self.blocks = nn.Sequential(InvertedResidual(5, 11, 4, 5), InvertedResidual(5, 13, 6, 7))
        self.classifier = nn.Sequential(nn.Linear(7, 9), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(9, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean([2, 3]))


class ConvnextBlock(nn.Module):
    """Depthwise 7x7, LayerNorm over channels that stand last, two linear layers, and a scale per channel."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.expand = nn.Linear(width, inner)
        self.project = nn.Linear(inner, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.project(F.gelu(self.expand(y)))).permute(0, 3, 1, 2)


class Convnext(nn.Module):
    """A stem of patches and two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 2, 2)
        self.blocks = nn.Sequential(ConvnextBlock(6, 13), ConvnextBlock(6, 11))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x)).mean([-2, -1])))


class Fire(nn.Module):
    """A squeeze, and two expansions of it side by side."""

    def __init__(self, width: int, squeeze: int, expand1: int, expand3: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(width, squeeze, 1)
        self.expand1 = nn.Conv2d(squeeze, expand1, 1)
        self.expand3 = nn.Conv2d(squeeze, expand3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1(x)), F.relu(self.expand3(x))], 1)


class Squeezenet(nn.Module):
    """Two fire modules, and a convolution that classifies."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3)
        self.fires = nn.Sequential(Fire(5, 3, 6, 7), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(13, 4, 8, 9))
        self.classifier = nn.Conv2d(17, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.classifier(self.fires(F.relu(self.stem(x)))))
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


class Inception(nn.Module):
    """Four branches of different depth side by side, flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 9, 3)
        self.branch1 = nn.Sequential(nn.Conv2d(9, 4, 1), nn.ReLU())
        self.branch2 = nn.Sequential(nn.Conv2d(9, 5, 1), nn.ReLU(), nn.Conv2d(5, 6, 3, padding=1), nn.ReLU())
        self.branch3 = nn.Sequential(nn.Conv2d(9, 3, 1), nn.ReLU(), nn.Conv2d(3, 7, 5, padding=2), nn.ReLU())
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(9, 8, 1), nn.ReLU())
        self.head = nn.Linear(25 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], dim=1)
        return self.head(F.avg_pool2d(x, 3).flatten(1))


class MixerBlock(nn.Module):
    """A perceptron over the places, then one over the channels."""

    def __init__(self, places: int, width: int, over_places: int, over_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.places = nn.Sequential(nn.Linear(places, over_places), nn.GELU(), nn.Linear(over_places, places))
        self.channels = nn.Sequential(nn.Linear(width, over_channels), nn.GELU(), nn.Linear(over_channels, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """Patches and two mixer blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 7, 2, 2)
        self.blocks = nn.Sequential(MixerBlock(16, 7, 5, 9), MixerBlock(16, 7, 6, 11))
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


CONVOLUTIONAL: dict[str, Sample] = {
    # Three convolutions and the hidden layer of the classifier: 4 groups, 4 orders.
    "vgg": Sample(Vgg, images(3)),
    # The stem, a stream per stage, and two groups inside each of three blocks: 9 groups, 9 orders.
    "resnet_bottleneck": Sample(ResnetBottleneck, images(3)),
    # A stream per stage (the stem is the first) and the inside of each of two blocks: 4 groups, 4 orders.
    "resnet_preactivation": Sample(ResnetPreactivation, images(3)),
    # The stem with the residual, expansion and squeeze of each of two blocks, the second block's output, and the
    # hidden layer of the classifier; depthwise channels follow: 7 groups, 7 orders.
    "mobilenet_v3": Sample(MobilenetV3, images(3)),
    # The stream and the inside of each of two blocks: 3 groups, 3 orders.
    "convnext_block": Sample(Convnext, images(3)),
    # The stem, and squeeze and two expansions of each of two modules: 7 groups, 7 orders.
    "squeezenet_fire": Sample(Squeezenet, images(3)),
    # The stem, the ends of four branches, and the insides of two of them: 7 groups, 7 orders.
    "inception": Sample(Inception, images(3)),
    # The stream, and of each of two blocks the hidden layer over places and over channels: 5 groups, 5 orders.
    "mixer": Sample(Mixer, images(3)),
    **GROUPED,
    **GENERATIVE,
}
