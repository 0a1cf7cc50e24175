"""One attention block in the ways it is written: how queries, keys and values are laid out and multiplied."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures.base import Sample, numbers


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns softmax attention over the last but one axis."""
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v


class Spelling(nn.Module):
    """A residual stream with one attention block on it; subclasses say how it attends."""

    def __init__(self, heads: int = 3, size: int = 4, value_size: int = 0) -> None:
        super().__init__()
        self.heads, self.size, self.value_size = heads, size, value_size or size
        self.embed = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.out = nn.Linear(heads * self.value_size, 10)
        self.head = nn.Linear(10, 3)

    def attend(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.out(self.attend(self.norm(x)))
        return self.head(x.mean(1))


class Fused(Spelling):
    """One linear layer makes queries, keys and values."""

    def __init__(self, heads: int = 3, size: int = 4) -> None:
        super().__init__(heads, size)
        self.qkv = nn.Linear(10, 3 * heads * size)


class QkvChunk(Fused):
    """Three chunks, each cut into heads."""

    def attend(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q = q.view(batch, length, self.heads, self.size).transpose(1, 2)
        k = k.view(batch, length, self.heads, self.size).transpose(1, 2)
        v = v.view(batch, length, self.heads, self.size).transpose(1, 2)
        return attention(q, k, v).transpose(1, 2).contiguous().view(batch, length, -1)


class QkvUnbind(Fused):
    """An axis of three, unbound where it stands."""

    def attend(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, self.size).unbind(2)
        y = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return y.transpose(1, 2).flatten(2)


class QkvIndex(Fused):
    """An axis of three, moved to the front and indexed."""

    def attend(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        y = attention(qkv[0], qkv[1], qkv[2])
        return y.transpose(1, 2).reshape(batch, length, self.heads * self.size)


class QkvPerHeadChunk(Fused):
    """Each head holds its query, key and value side by side."""

    def attend(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, self.heads, 3 * self.size).permute(0, 2, 1, 3)
        q, k, v = qkv.chunk(3, dim=-1)
        return attention(q, k, v).permute(0, 2, 1, 3).reshape(batch, length, self.heads * self.size)


class QkvEinsum(Fused):
    """The heads stay where they are; einsum sums over dimensions and places."""

    def attend(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, self.size).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.size**-0.5
        y = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        return y.reshape(batch, length, -1)


class SeparateSdpa(Spelling):
    """Three linear layers and torch's scaled dot product."""

    def __init__(self, heads: int = 3, size: int = 4, value_size: int = 5) -> None:
        super().__init__(heads, size, value_size)
        self.q = nn.Linear(10, heads * size)
        self.k = nn.Linear(10, heads * size)
        self.v = nn.Linear(10, heads * value_size)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class GroupedQuery(Spelling):
    """Several query heads read one head of keys and values."""

    def __init__(self, shared: int, each: int, size: int) -> None:
        super().__init__(shared * each, size)
        self.each = each
        self.q = nn.Linear(10, shared * each * size, bias=False)
        self.k = nn.Linear(10, shared * size, bias=False)
        self.v = nn.Linear(10, shared * size, bias=False)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values with the heads before the places."""
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, -1, self.size).transpose(1, 2)
        k = self.k(x).view(batch, length, -1, self.size).transpose(1, 2)
        v = self.v(x).view(batch, length, -1, self.size).transpose(1, 2)
        return q, k, v


class GroupedQuerySdpa(GroupedQuery):
    """Torch repeats the shared heads."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)


class GroupedQueryRepeat(GroupedQuery):
    """The shared heads are repeated by hand."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        k, v = k.repeat_interleave(self.each, dim=1), v.repeat_interleave(self.each, dim=1)
        return attention(q, k, v).transpose(1, 2).flatten(2)


class MultiQuery(Spelling):
    """All query heads read the only head of keys and values."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.q = nn.Linear(10, 12)
        self.kv = nn.Linear(10, 8)

    def attend(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
        k, v = self.kv(x).unsqueeze(1).split(self.size, dim=-1)
        return attention(q, k, v).transpose(1, 2).flatten(2)


class Rotary(SeparateSdpa):
    """Queries and keys are turned by an angle that grows with the place, each pair of dimensions at its own speed."""

    def turned(self, x: Tensor) -> Tensor:
        """Returns queries or keys after the turn."""
        half = x.shape[-1] // 2
        speeds = 10.0 ** (-torch.arange(half, device=x.device) / half)
        angles = (torch.arange(x.shape[-2], device=x.device)[:, None] * speeds).to(x.dtype)
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        return y.transpose(1, 2).flatten(2)


class LinearAttention(SeparateSdpa):
    """Positive features of queries and keys instead of a softmax, so that keys and values are summed first."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.q, self.k, self.v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        summed = torch.einsum("bnhd,bnhe->bhde", k, v)
        scale = 1 / torch.einsum("bnhd,bhd->bnh", q, k.sum(1))
        return torch.einsum("bnhd,bhde,bnh->bnhe", q, summed, scale).flatten(2)


class RelativeBias(SeparateSdpa):
    """A learned table says for each head how much a distance counts."""

    index: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        places = torch.arange(length)
        self.table = nn.Parameter(torch.randn(self.heads, 2 * length - 1))
        self.register_buffer("index", places[:, None] - places[None, :] + length - 1, persistent=False)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) + self.table[:, self.index]
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


SPELLINGS: dict[str, Sample] = {
    # The stream, the heads, and inside each of 3 heads query/key and value/output: 4 groups, 8 orders.
    "qkv_chunk": Sample(QkvChunk, numbers(2, 5, 6)),
    # As above, 2 heads: 4 groups, 6 orders.
    "qkv_unbind": Sample(lambda: QkvUnbind(2, 5), numbers(2, 7, 6)),
    # As above, 3 heads: 4 groups, 8 orders.
    "qkv_index": Sample(QkvIndex, numbers(2, 5, 6)),
    # As above, 4 heads: 4 groups, 10 orders.
    "qkv_per_head_chunk": Sample(lambda: QkvPerHeadChunk(4, 5), numbers(2, 7, 6)),
    # As above, 3 heads: 4 groups, 8 orders.
    "qkv_einsum": Sample(QkvEinsum, numbers(2, 5, 6)),
    # As above, 3 heads: 4 groups, 8 orders.
    "separate_qkv_sdpa": Sample(SeparateSdpa, numbers(2, 7, 6)),
    # The stream, the 3 shared heads, and for each of them the query heads that read it, query/key and value/output:
    # 5 groups, 11 orders.
    "grouped_query_sdpa": Sample(lambda: GroupedQuerySdpa(3, 2, 4), numbers(2, 7, 6)),
    # As above, 2 shared heads: 5 groups, 8 orders.
    "grouped_query_repeat": Sample(lambda: GroupedQueryRepeat(2, 3, 5), numbers(2, 7, 6)),
    # The stream, the query heads, query/key and value/output: 4 groups, 4 orders.
    "multi_query": Sample(MultiQuery, numbers(2, 5, 6)),
    # The stream, the heads, and inside each of 2 heads value/output; query/key stay: 3 groups, 4 orders.
    "rotary": Sample(lambda: Rotary(2, 4, 5), numbers(2, 7, 6)),
    # The stream, the heads, and inside each of 3 heads query/key and value/output: 4 groups, 8 orders.
    "linear_attention": Sample(LinearAttention, numbers(2, 7, 6)),
    # As above, and the rows of the table follow the heads: 4 groups, 8 orders.
    "relative_bias": Sample(lambda: RelativeBias(7), numbers(2, 7, 6)),
}
