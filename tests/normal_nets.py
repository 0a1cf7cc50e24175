"""Small transformers for normal forms: streams behind norms in many spellings, and those that must be refused."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mergekit_ot import trace_model
from mergekit_ot.graph.normal_form.find import find_normal_form
from mergekit_ot.graph.normal_form.form import NormalForm

WIDTH, HEADS, VOCABULARY, LENGTH = 8, 2, 11, 6
TOKENS = (torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0)),)
ROWS = (torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0)),)
IMAGES = (torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)),)

Norm = Callable[[int], nn.Module]


def rotated(x: Tensor) -> Tensor:
    """Returns queries or keys turned by their places, as rotary positions do."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[-2], dtype=x.dtype), 0.3 ** torch.arange(half, dtype=x.dtype))
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
    first, second = x.split(half, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def slopes(length: int, dtype: torch.dtype) -> Tensor:
    """Returns what ALiBi adds to the scores."""
    places = torch.arange(length, dtype=dtype)
    return -(places[:, None] - places[None, :]).abs() * torch.tensor([0.5, 0.25], dtype=dtype)[:, None, None]


class Attention(nn.Module):
    """Attention of two heads, with separate projections."""

    def __init__(
        self, bias: bool = True, rotary: bool = False, alibi: bool = False, spelled: bool = False, causal: bool = True
    ) -> None:
        super().__init__()
        self.rotary, self.alibi, self.spelled, self.causal = rotary, alibi, spelled, causal
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias) for _ in range(4))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (m(x).view(b, t, HEADS, d // HEADS).transpose(1, 2) for m in (self.q, self.k, self.v))
        if self.rotary:
            q, k = rotated(q), rotated(k)
        if self.spelled or self.alibi:
            scores = q @ k.transpose(-2, -1) / (d // HEADS) ** 0.5
            scores = scores + slopes(t, x.dtype) if self.alibi else scores
            mask = torch.ones(t, t, dtype=torch.bool).tril()
            y = self.drop(scores.masked_fill(~mask, float("-inf")).softmax(-1)) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.drop(self.o(y.transpose(1, 2).reshape(b, t, d)))


class Mlp(nn.Module):
    """Two linear maps around GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class SwiGlu(nn.Module):
    """A gated network without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 12, bias=False), nn.Linear(WIDTH, 12, bias=False)
        self.down = nn.Linear(12, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and a network behind it, each behind a norm and added to the stream."""

    def __init__(self, norm: Norm, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.n1, self.n2, self.attention, self.mlp = norm(WIDTH), norm(WIDTH), attention, mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.n1(x))
        return x + self.mlp(self.n2(x))


class Language(nn.Module):
    """Tokens, places where wanted, blocks, a norm, and a head over the vocabulary."""

    def __init__(
        self, norm: Norm, *blocks: nn.Module, places: bool = True, head_bias: bool = False, tied: bool = False
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(4 * LENGTH, WIDTH) if places else None
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=head_bias)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        if self.places is not None:
            x = x + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def gpt(tied: bool = True, head_bias: bool = False) -> Language:
    """Returns a small GPT."""
    blocks = (Block(nn.LayerNorm, Attention(), Mlp()) for _ in range(2))
    return Language(nn.LayerNorm, *blocks, tied=tied, head_bias=head_bias)


def llama() -> Language:
    """Returns a small Llama."""
    blocks = (Block(nn.RMSNorm, Attention(bias=False, rotary=True), SwiGlu()) for _ in range(2))
    return Language(nn.RMSNorm, *blocks, places=False)


class Vit(nn.Module):
    """Patches, a class token, a table of places, and one block."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.places = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.block = Block(nn.LayerNorm, Attention(causal=False), Mlp())
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        return self.head(self.norm(self.block(x)[:, 0]))


class Multiple(nn.Module):
    """A head that reads half of what a norm gives."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH, bias=bias), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x)) * 0.5)


def found(make: Callable[[], nn.Module], inputs: tuple[object, ...]) -> NormalForm:
    """Returns the normal form of a model."""
    return find_normal_form(trace_model(make(), inputs), make, inputs)


def random_state(make: Callable[[], nn.Module], seed: int = 5) -> dict[str, Tensor]:
    """Returns random weights in float64, gains and biases included; tied names hold the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    model = make().double()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.5 + noise)
    return {name: value.clone() for name, value in model.state_dict().items()}


def outputs(make: Callable[[], nn.Module], state: dict[str, Tensor], inputs: tuple[object, ...]) -> Tensor:
    """Returns what a fresh instance that holds a state computes, in float64."""
    model = make().double().eval()
    model.load_state_dict(state)
    given = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    with torch.no_grad():
        result = model(*given)
    return result


def change(make: Callable[[], nn.Module], state: dict[str, Tensor], new: dict[str, Tensor], inputs: tuple) -> float:
    """Returns how far the outputs of two states are apart, relative to the largest."""
    before, after = outputs(make, state, inputs), outputs(make, new, inputs)
    return float((before - after).abs().max() / before.abs().max())
