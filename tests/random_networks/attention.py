"""Blocks with heads, steps, places and experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from random_networks.block import IMAGES, LENGTH, LINES, Block, one_of


class Heads(Block):
    """The features as heads of some features each."""

    draws = (
        one_of(2, 3, 4, 6),
        one_of("mean", "inner mean", "maximum", "softmax", "norm", "shared", "own", "between", "gate", "scores"),
        st.booleans(),
    )
    axes = (LINES,)

    def setup(self, width: int, heads: int, form: str, is_added: bool) -> None:
        self.heads, self.form, self.is_added, inside = heads, form, is_added, width // heads
        self.norm, self.shared, self.between = nn.LayerNorm(inside), nn.Linear(inside, inside), nn.Linear(heads, heads)
        self.own, self.gate = nn.Parameter(torch.randn(heads, inside, inside)), nn.Linear(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.changed(x.unflatten(-1, (self.heads, -1)), x).flatten(-2)
        return x + heads if self.is_added else heads

    def changed(self, x: Tensor, whole: Tensor) -> Tensor:
        if self.form in ("mean", "inner mean"):
            return x.mean(-2 if self.form == "mean" else -1, keepdim=True).expand_as(x)
        if self.form == "maximum":
            return x - x.amax(-2, keepdim=True)
        if self.form == "softmax":
            return x.softmax(-2)
        if self.form == "norm":
            return self.norm(x)
        if self.form == "shared":
            return torch.relu(self.shared(x))
        if self.form == "own":
            return torch.einsum("blhi,hio->blho", x, self.own)
        if self.form == "between":
            return self.between(x.transpose(-1, -2)).transpose(-1, -2)
        if self.form == "gate":
            return x * torch.sigmoid(self.gate(whole)).unsqueeze(-1)
        return (x @ x.transpose(-1, -2)).softmax(-1) @ x


class Attention(Block):
    """Multi-head attention written out, with key and value heads that several query heads may share."""

    draws = (
        one_of(2, 4, 6),
        one_of(1, 2),
        one_of("matmul", "einsum", "kernel", "grouped"),
        one_of("three", "fused", "fused by head"),
        one_of("plain", "norm", "causal"),
    )
    axes = (LINES,)

    def setup(self, width: int, heads: int, shared: int, form: str, weights: str, extra: str) -> None:
        self.heads, self.kept, self.form, self.extra = heads, heads // shared, form, extra
        self.inside, self.weights = 12 // heads, weights
        if weights == "fused by head":
            self.kept = heads
        self.sizes = [self.inside * count for count in (heads, self.kept, self.kept)]
        self.layers = nn.ModuleList(
            nn.Linear(width, size) for size in (self.sizes if weights == "three" else [sum(self.sizes)])
        )
        self.norm, self.last = nn.LayerNorm(self.inside), nn.Linear(sum(self.sizes[:1]), width)

    def operands(self, x: Tensor) -> list[Tensor]:
        """Returns queries, keys and values as (batch, heads, length, features)."""
        if self.weights == "fused by head":
            return list(self.layers[0](x).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4).unbind(0))
        flat = [layer(x) for layer in self.layers]
        parts = flat if self.weights == "three" else flat[0].split(self.sizes, -1)
        return [part.unflatten(-1, (-1, self.inside)).transpose(1, 2) for part in parts]

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.operands(x)
        if self.extra == "norm":
            query, key = self.norm(query), self.norm(key)
        return self.last(self.met(query, key, value).transpose(1, 2).flatten(2))

    def met(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        times = self.heads // self.kept
        is_causal = self.extra == "causal"
        if self.form == "grouped":
            query = query.unflatten(1, (self.kept, times))
            scores = torch.einsum("bkgqd,bkpd->bkgqp", query, key).softmax(-1)
            return torch.einsum("bkgqp,bkpd->bkgqd", scores, value).flatten(1, 2)
        if self.form == "kernel":
            return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=times > 1)
        if self.form == "matmul":
            key, value = (part.repeat_interleave(times, 1) for part in (key, value))
            scores = query @ key.transpose(-1, -2) / self.inside**0.5
        else:
            key, value = (
                part[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) if times > 1 else part
                for part in (key, value)
            )
            scores = torch.einsum("bhqd,bhkd->bhqk", query, key)
        if is_causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~mask, -1e9)
        return scores.softmax(-1) @ value


class Recurrent(Block):
    draws = (
        one_of("LSTM", "GRU", "RNN"),
        one_of(1, 2),
        st.booleans(),
        st.booleans(),
        one_of("steps", "last", "both"),
    )
    axes = (LINES,)

    def setup(self, width: int, kind: str, layers: int, is_both_ways: bool, batch_first: bool, reading: str) -> None:
        self.width, self.reading, hidden = 12, reading, 6 if is_both_ways else 12
        self.layer: nn.RNNBase = getattr(nn, kind)(
            width, hidden, layers, bidirectional=is_both_ways, batch_first=batch_first
        )

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer.batch_first
        steps, state = self.layer(x if first else x.transpose(0, 1))
        steps = steps if first else steps.transpose(0, 1)
        state = state[0] if isinstance(state, tuple) else state
        last = torch.cat([state[-2], state[-1]], -1) if self.layer.bidirectional else state[-1]
        if self.reading == "steps":
            return steps
        return last.unsqueeze(1).expand(-1, x.shape[1], -1) + (steps if self.reading == "both" else 0)


class Gram(Block):
    draws = (one_of("places", "features", "softmax", "weights"),)
    axes = (LINES,)

    def setup(self, width: int, form: str) -> None:
        self.form, self.layer = form, nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "places":
            return x @ x.transpose(1, 2) @ self.layer(x) / x.shape[-1]
        if self.form == "softmax":
            return (self.layer(x) @ x.transpose(1, 2)).softmax(-1) @ x
        if self.form == "features":
            return x @ (x.transpose(1, 2) @ x) / x.shape[-1]
        return x @ torch.tanh(x.transpose(1, 2) @ self.layer(x))


class Places(Block):
    """A linear map along the length, or of all places at once."""

    draws = (one_of("mix", "flatten"),)
    axes = (LINES,)

    def setup(self, width: int, form: str) -> None:
        self.form = form
        self.layer = nn.Linear(LENGTH, LENGTH) if form == "mix" else nn.Linear(LENGTH * width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "mix":
            return self.layer(x.transpose(1, 2)).transpose(1, 2)
        return x + self.layer(x.flatten(1)).unsqueeze(1)


class Experts(Block):
    draws = (one_of(2, 3), one_of("sum", "cat"))
    axes = (LINES,)

    def setup(self, width: int, count: int, form: str) -> None:
        self.form, self.router = form, nn.Linear(width, count)
        self.first = nn.Parameter(torch.randn(count, width, 8))
        self.second = nn.Parameter(torch.randn(count, 8, width))
        self.last = nn.Linear(count * width, width) if form == "cat" else None

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(torch.einsum("blw,ewh->bleh", x, self.first))
        weighted = torch.einsum("bleh,ehw->blew", inner, self.second) * self.router(x).softmax(-1).unsqueeze(-1)
        return weighted.sum(2) if self.last is None else self.last(weighted.flatten(2))


class Outer(Block):
    """The outer product of two short vectors."""

    draws = (one_of((3, 4), (2, 6), (4, 6)), st.booleans())
    axes = (LINES,)

    def setup(self, width: int, sizes: tuple[int, int], is_einsum: bool) -> None:
        self.first, self.second = (nn.Linear(width, size) for size in sizes)
        self.width, self.is_einsum = sizes[0] * sizes[1], is_einsum

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.first(x), torch.tanh(self.second(x))
        if self.is_einsum:
            return torch.einsum("bli,blj->blij", one, other).flatten(2)
        return (one.unsqueeze(-1) * other.unsqueeze(-2)).flatten(2)


class Tokens(Block):
    """The places of an image as a line, through blocks for lines."""

    chains, inner, axes = 1, LINES, (IMAGES,)

    def setup(self, width: int, chain: Any) -> None:
        self.branch, self.width = chain

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


class Resize(Block):
    draws = (one_of("pool", "pixels", "channels"), one_of(2, 3))
    axes = (IMAGES,)

    def setup(self, width: int, form: str, groups: int) -> None:
        self.form, self.groups = form, groups

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "pool":
            return F.interpolate(F.max_pool2d(x, 2), scale_factor=2.0)
        if self.form == "channels":
            return F.channel_shuffle(x, self.groups)
        return F.pixel_unshuffle(torch.tanh(F.pixel_shuffle(x, 2)), 2)
