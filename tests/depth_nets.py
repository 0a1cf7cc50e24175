"""Small networks of any depth on a residual stream, with values in every parameter and buffer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class ConvBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


class Convolutional(nn.Module):
    """A stage of blocks with BatchNorm behind a stem; ReLU on the stream, as in a ResNet."""

    def __init__(self, depth: int, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.layer1 = nn.Sequential(*(ConvBlock(width) for _ in range(depth)))
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer1(self.stem(x).relu()).mean((2, 3)))


class Attending(nn.Module):
    """A block of a transformer: the norms stand before the branches, or behind the sums."""

    def __init__(self, width: int, is_post: bool) -> None:
        super().__init__()
        self.is_post = is_post
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def attended(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.is_post:
            x = self.norm1(x + self.attended(x))
            return self.norm2(x + self.down(functional.gelu(self.up(x))))
        x = x + self.attended(self.norm1(x))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, depth: int, is_post: bool = False) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.blocks = nn.ModuleList(Attending(8, is_post) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Adding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def perceptron(depth: int, width: int = 6, inputs: int = 5, outputs: int = 3) -> nn.Sequential:
    """A perceptron with residual blocks, whose last layer stands at another number in each depth."""
    blocks = (Adding(width) for _ in range(depth))
    return nn.Sequential(nn.Linear(inputs, width), *blocks, nn.LayerNorm(width), nn.Linear(width, outputs))


IMAGES = torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
NETS: dict[str, tuple[Callable[[int], nn.Module], Tensor]] = {
    "convolutional": (Convolutional, IMAGES),
    "transformer": (Transformer, TOKENS),
    "perceptron": (perceptron, ROWS),
}


def filled(model: nn.Module, seed: int) -> nn.Module:
    """Returns the model in evaluation mode with random values in all that a training changes."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else 0.4 * drawn + (tensor.ndim == 1))
    return model.eval()
