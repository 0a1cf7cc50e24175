"""Streams behind norms in many spellings, with the rewrites of each counted by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from normal_nets import IMAGES, ROWS, TOKENS, WIDTH, Attention, Block, Language, Mlp, Multiple, SwiGlu, Vit, gpt, llama
from torch import Tensor, nn


def encoder() -> nn.Module:
    """Torch's encoder with the norms in front."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, batch_first=True, norm_first=True)
    stack = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), stack, nn.Linear(WIDTH, 3))


class Multihead(nn.Module):
    """Torch's attention between two inputs, each behind its own norm: the fused weight is read in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.n1, self.n2, self.n3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.one(x), self.other(x.flip(1))
        memory = self.n2(y)
        x = x + self.attention(self.n1(x), memory, memory)[0]
        return self.head(self.n3(x).mean(1))


class Fused(nn.Module):
    """A fused projection, cut into queries, keys and values of fewer heads, in Llama's hand-spelled norm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, WIDTH + 8), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).split([d, 4, 4], -1)
        q, k, v = (y.view(b, t, -1, 4).transpose(1, 2) for y in (q, k, v))
        k, v = (y.repeat_interleave(2, 1) for y in (k, v))
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(b, t, d))


class SpelledRms(nn.Module):
    """RMSNorm as transformers spells it, with a cast; Gemma's gain is one more than its weight."""

    def __init__(self, width: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.randn(width)), offset

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float64)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        gain = self.offset + self.weight if self.offset else self.weight
        return gain * y.to(x.dtype)


class SpelledLayerNorm(nn.Module):
    """LayerNorm by hand, with a cast."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float64)
        y = y - y.mean(-1, keepdim=True)
        y = y / torch.sqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)
        return y.to(x.dtype) * self.gain + self.shift


class Convolved(nn.Module):
    """A norm that a convolution without padding reads, and a head that reads a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.conv, self.head = nn.Conv1d(WIDTH, 5, 3), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.embed(x))
        return self.conv(y.transpose(1, 2)).mean(-1) + self.head(y.mean(1))


class Grouped(nn.Module):
    """Torch's attention of two heads of queries on one of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Masked(nn.Module):
    """Torch's multi-head attention with a mask that is added, and its weights asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf"), dtype=x.dtype).triu(1)
        return self.attention(x, x, x, attn_mask=mask, need_weights=True)[0]


class UnitNorm(nn.Module):
    """RMSNorm as a vector of length one, times a number and a gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.length = nn.Parameter(torch.randn(width)), width**0.5

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1) * self.length * self.gain


class Products(nn.Module):
    """Maps written as products and sums, with weights that stand the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.shift = nn.Parameter(torch.randn(WIDTH, 12)), nn.Parameter(torch.randn(12))
        self.down, self.last = nn.Parameter(torch.randn(WIDTH, 12)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.up + self.shift) @ self.down.T + self.last


class SharedNorm(nn.Module):
    """One norm, read by other maps at each of its two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.mlp, self.head = Mlp(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.norm(x + self.mlp(self.norm(x))))


def twice() -> nn.Module:
    """Returns a model that runs one block twice: every tensor of it has two names."""
    block = Block(nn.LayerNorm, Attention(), Mlp())
    return Language(nn.LayerNorm, block, block, head_bias=True)


def spelled(
    norm: Callable[[int], nn.Module], attention: type[nn.Module] = Fused, mlp: type[nn.Module] = Mlp
) -> Callable[[], nn.Module]:
    """Returns what makes a language model with one kind of norm, attention and network."""
    return lambda: Language(norm, Block(norm, attention(), mlp()), head_bias=True)


# Network → how many of each rewrite, and whether the stream is centred: counted by hand.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[object, ...], tuple[int, int, int], bool]] = {
    "gpt, tied": (gpt, TOKENS, (4, 4, 1), False),
    "gpt, untied": (lambda: gpt(tied=False), TOKENS, (5, 4, 1), True),
    "gpt, head with a bias": (lambda: gpt(tied=False, head_bias=True), TOKENS, (5, 4, 1), True),
    "llama": (llama, TOKENS, (5, 0, 0), False),
    "vit": (Vit, IMAGES, (3, 2, 1), True),
    "torch's encoder": (encoder, ROWS, (5, 2, 1), True),
    "torch's attention of two inputs": (Multihead, ROWS, (3, 1, 2), True),
    "hand-spelled RMSNorm, fused": (spelled(SpelledRms), TOKENS, (3, 1, 0), False),
    "one plus the gain": (spelled(lambda width: SpelledRms(width, 1.0)), TOKENS, (3, 1, 0), False),
    "hand-spelled LayerNorm": (spelled(SpelledLayerNorm), TOKENS, (3, 1, 1), True),
    "LayerNorm without bias": (spelled(lambda width: nn.LayerNorm(width, bias=False)), TOKENS, (3, 1, 1), True),
    "convolution behind a norm": (Convolved, ROWS, (1, 0, 1), True),
    "one block twice": (twice, TOKENS, (3, 0, 1), True),
    "one norm in two places": (SharedNorm, ROWS, (1, 0, 1), True),
    "grouped queries": (spelled(nn.LayerNorm, Grouped), TOKENS, (3, 2, 1), True),
    "mask that is added": (spelled(nn.LayerNorm, Masked), TOKENS, (3, 1, 1), True),
    "norm of length one": (spelled(UnitNorm), TOKENS, (3, 1, 0), False),
    "products and sums": (spelled(nn.LayerNorm, Fused, Products), TOKENS, (3, 1, 1), True),
    "half of a norm": (lambda: Multiple(bias=False), ROWS, (1, 0, 1), True),
    "alibi": (
        lambda: Language(nn.LayerNorm, Block(nn.LayerNorm, Attention(alibi=True), SwiGlu()), places=False),
        TOKENS,
        (3, 2, 1),
        True,
    ),
    "spelled attention": (
        lambda: Language(nn.LayerNorm, Block(nn.LayerNorm, Attention(spelled=True), Mlp())),
        TOKENS,
        (3, 2, 1),
        True,
    ),
}
