"""Networks of the real sizes that tracing is measured on."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Basic(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def branch(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class _Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)

    def branch(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.bn3(self.conv3(x))


class _Block(nn.Module):
    def __init__(self, kind: type[_Basic | _Bottleneck], inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = kind(inputs, width, stride)
        outputs = width * kind.expansion
        is_changed = stride > 1 or inputs != outputs
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if is_changed
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body.branch(x) + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ResNet for images of 224 × 224 (arXiv:1512.03385)."""

    def __init__(self, kind: type[_Basic | _Bottleneck], depths: tuple[int, ...]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        blocks: list[nn.Module] = []
        inputs = 64
        for stage, depth in enumerate(depths):
            for number in range(depth):
                width = 64 * 2**stage
                blocks.append(_Block(kind, inputs, width, 2 if stage and not number else 1))
                inputs = width * kind.expansion
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.fc(F.adaptive_avg_pool2d(self.blocks(x), 1).flatten(1))


def mnist_mlp() -> nn.Module:
    """Returns a perceptron for images of 28 × 28, without biases."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise((784, 400, 200, 100, 10)):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def vgg16() -> nn.Module:
    """Returns VGG16 with batch normalisation for images of 32 × 32 (arXiv:1409.1556), with one linear layer."""
    layers: list[nn.Module] = []
    inputs = 3
    for stage, depth in enumerate((2, 2, 3, 3, 3)):
        width = min(64 * 2**stage, 512)
        for _ in range(depth):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs, 10))


def resnet18() -> nn.Module:
    """Returns ResNet-18."""
    return ResNet(_Basic, (2, 2, 2, 2))


def resnet50() -> nn.Module:
    """Returns ResNet-50."""
    return ResNet(_Bottleneck, (3, 4, 6, 3))


class _LlamaLayer(nn.Module):
    def __init__(self, width: int, heads: int, shared: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.shared, self.size = heads, shared, width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, shared * self.size, bias=False)
        self.v_proj = nn.Linear(width, shared * self.size, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        y = self.norm1(x)
        q = self.q_proj(y).view(batch, length, self.heads, self.size).transpose(1, 2)
        k = self.k_proj(y).view(batch, length, self.shared, self.size).transpose(1, 2)
        v = self.v_proj(y).view(batch, length, self.shared, self.size).transpose(1, 2)
        q, k = (part * cos + _rotated(part) * sin for part in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.shared)
        x = x + self.o_proj(y.transpose(1, 2).reshape(batch, length, width))
        y = self.norm2(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


def _rotated(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


class Llama(nn.Module):
    """A decoder in the manner of Llama (arXiv:2302.13971): rotary embeddings, RMSNorm, SwiGLU, grouped queries."""

    def __init__(
        self,
        layers: int = 32,
        width: int = 4096,
        heads: int = 32,
        shared: int = 32,
        hidden: int = 11008,
        vocabulary: int = 32000,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(_LlamaLayer(width, heads, shared, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        rates = 10000.0 ** (-torch.arange(0, width // heads, 2) / (width // heads))
        self.register_buffer("rates", rates, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        angles = torch.arange(tokens.shape[1], device=tokens.device)[:, None] * self.rates
        angles = torch.cat([angles, angles], -1)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin())
        return self.head(self.norm(x))


def llama(layers: int, width: int = 4096, hidden: int = 11008) -> nn.Module:
    """Returns a decoder of Llama-7B's width with some of its layers, without memory for its weights."""
    with torch.device("meta"):
        return Llama(layers, width=width, hidden=hidden)


def small_llama() -> nn.Module:
    """Returns a decoder of two layers, four query heads on two key heads."""
    return Llama(2, width=32, heads=4, shared=2, hidden=44, vocabulary=37)
