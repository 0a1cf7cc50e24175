"""Transformers: torch's modules, decoders, attention between two inputs, and pooling by attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures.attention_spellings import SPELLINGS, attention
from architectures.base import Sample, images, numbers, tokens


class Vit(nn.Module):
    """Patches, a class token, a table of places, and a block around torch's multi-head attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.places = nn.Parameter(torch.randn(1, 5, 12))
        self.norm1 = nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.norm2 = nn.LayerNorm(12)
        self.mlp = nn.Sequential(nn.Linear(12, 14), nn.GELU(), nn.Linear(14, 12))
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x)[:, 0])


class TransformerEncoder(nn.Module):
    """Torch's encoder of two layers and a mean over the places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 10)
        layer = nn.TransformerEncoderLayer(10, 2, 13, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


class TransformerFull(nn.Module):
    """Torch's encoder and decoder, one layer each, with a causal mask on the target."""

    mask: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        self.source = nn.Embedding(11, 8)
        self.target = nn.Embedding(13, 8)
        self.transformer = nn.Transformer(8, 2, 1, 1, 9, batch_first=True)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)
        self.head = nn.Linear(8, 13)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x, y = self.source(source), self.target(target)
        return self.head(self.transformer(x, y, tgt_mask=self.mask.to(y.dtype), tgt_is_causal=True))


class CrossAttention(nn.Module):
    """One input asks the other, in heads that are narrower than either stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 10)
        self.embed_context = nn.Linear(5, 9)
        self.q = nn.Linear(10, 12)
        self.kv = nn.Linear(9, 24)
        self.out = nn.Linear(12, 10)
        self.head = nn.Linear(10, 7)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x, context = self.embed(x), F.gelu(self.embed_context(context))
        q = self.q(x).unflatten(-1, (3, 4)).transpose(1, 2)
        k, v = self.kv(context).unflatten(-1, (2, 3, 4)).permute(2, 0, 3, 1, 4)
        return self.head(x + self.out(attention(q, k, v).transpose(1, 2).flatten(2)))


class CausalDecoder(nn.Module):
    """A language model: words and places, a block with a causal mask, and an output tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 12)
        self.places = nn.Embedding(9, 12)
        self.norm1 = nn.LayerNorm(12)
        self.qkv = nn.Linear(12, 36, bias=False)
        self.out = nn.Linear(12, 12, bias=False)
        self.norm2 = nn.LayerNorm(12)
        self.mlp = nn.Sequential(nn.Linear(12, 14), nn.GELU(approximate="tanh"), nn.Linear(14, 12))
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        length = words.shape[1]
        x = self.words(words) + self.places(torch.arange(length, device=words.device))
        q, k, v = (part.unflatten(-1, (2, 6)).transpose(1, 2) for part in self.qkv(self.norm1(x)).split(12, dim=2))
        scores = q @ k.transpose(-2, -1) * 6**-0.5
        later = torch.ones(length, length, dtype=torch.bool, device=words.device).triu(1)
        y = scores.masked_fill(later, float("-inf")).softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).contiguous().view(*words.shape, 12))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x))


class AttentionPooling(nn.Module):
    """A learned query for each head pools the places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 10)
        self.query = nn.Parameter(torch.randn(3, 4))
        self.key = nn.Linear(10, 12)
        self.value = nn.Linear(10, 15)
        self.head = nn.Linear(15, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.embed(x))
        scores = (self.key(x).unflatten(-1, (3, 4)) * self.query).sum(-1)
        values = self.value(x).unflatten(-1, (3, 5))
        return self.head((scores.softmax(1).unsqueeze(-1) * values).sum(1).flatten(1))


class GatedAttentionUnit(nn.Module):
    """One head whose queries and keys are two scalings of the same features, and a gate on what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.gate_value = nn.Linear(10, 2 * 9)
        self.features = nn.Linear(10, 4)
        self.gamma = nn.Parameter(torch.randn(2, 4))
        self.beta = nn.Parameter(torch.randn(2, 4))
        self.out = nn.Linear(9, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        gate, value = F.silu(self.gate_value(y)).chunk(2, dim=-1)
        q, k = (F.silu(self.features(y)).unsqueeze(-2) * self.gamma + self.beta).unbind(-2)
        weights = F.relu(q @ k.transpose(-1, -2) / x.shape[1]).square()
        return self.head(x + self.out(gate * (weights @ value)))


ATTENTION: dict[str, Sample] = {
    # The stream, the heads, inside each of 3 heads query/key and value/output, and the perceptron: 5 groups, 9 orders.
    "vit_multihead": Sample(Vit, images(3)),
    # The stream; of each of two layers the heads, inside each of 2 heads query/key and value/output, and the
    # perceptron: 9 groups, 13 orders.
    "transformer_encoder": Sample(TransformerEncoder, numbers(2, 5, 6)),
    # A stream on each side; heads, and query/key and value/output inside each of 2 heads, three times; two
    # perceptrons: 13 groups, 2 + 3 * 5 + 2 = 19 orders (12 and 18 where the fused map of the attention between them,
    # whose rows read both streams, must have one order of columns).
    "transformer_full": Sample(lambda: TransformerFull(4), lambda: (*tokens(11, 5)(), *tokens(13, 4)())),
    # Two streams, the heads, and inside each of 3 heads query/key and value/output: 5 groups, 9 orders.
    "cross_attention": Sample(CrossAttention, lambda: (*numbers(2, 5, 6)(), *numbers(2, 7, 5)())),
    # The stream with words, places and output, the heads, inside each of 2 heads query/key and value/output, and the
    # perceptron: 5 groups, 7 orders.
    "causal_decoder": Sample(CausalDecoder, tokens(11)),
    # The embedding, the heads, and inside each of 3 heads query/key and value: 4 groups, 8 orders.
    "attention_pooling": Sample(AttentionPooling, numbers(2, 8, 6)),
    # The stream, the features, and the gate with the values: 3 groups, 3 orders.
    "gated_attention_unit": Sample(GatedAttentionUnit, numbers(2, 5, 6)),
    **SPELLINGS,
}
