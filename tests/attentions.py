"""Networks with one attention: of every kind that rotations may or may not pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rotating import WIDTH, Heads
from torch import Tensor, nn


class NormedHeads(Heads):
    """Queries and keys are normalised head by head, with gains or without."""

    def __init__(self, has_gains: bool, is_rotary: bool = False) -> None:
        super().__init__(bias=False, is_rotary=is_rotary)
        self.norms = nn.ModuleList(nn.RMSNorm(4, elementwise_affine=has_gains) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = self.norms[0](q), self.norms[1](k)
        if self.is_rotary:
            q, k = self.turned(q), self.turned(k)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Distant(Heads):
    """Scores fall with the distance of two places, each head's by a slope of its own (ALiBi)."""

    def __init__(self) -> None:
        super().__init__(bias=True)
        places = torch.arange(6.0)
        distance = (places[:, None] - places).abs()
        self.register_buffer("bias", -torch.tensor([0.5, 0.1])[:, None, None] * distance, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-1, -2) / 2 + self.bias).softmax(-1)
        return self.o((scores @ v).transpose(1, 2).flatten(2))


class Lone(nn.Module):
    """Attention with a single head: its inner spaces stand beside no heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, 4) for _ in range(3))
        self.o = nn.Linear(4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v)


class Forgetful(Heads):
    """Probabilities, and what heads send, are dropped at random while the network trains."""

    def __init__(self) -> None:
        super().__init__(bias=True)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        scores = self.drop((q @ k.transpose(-1, -2) / 2).softmax(-1))
        return self.drop(self.o((scores @ v).transpose(1, 2).flatten(2)))


class OneBlock(nn.Module):
    """A stream with one attention on it, behind norms."""

    def __init__(self, heads: nn.Module, norm: type[nn.Module] = nn.RMSNorm) -> None:
        super().__init__()
        self.embed, self.heads, self.head = nn.Linear(5, WIDTH), heads, nn.Linear(WIDTH, 3)
        self.norms = nn.ModuleList(norm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.heads(self.norms[0](x))
        return self.head(self.norms[1](x))
