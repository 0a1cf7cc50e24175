"""Blocks whose neurons hold families of neurons: experts, grouped queries with rotations, groups inside groups."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from random_networks.block import LINES, Block, linear, one_of


class StackedExperts(Block):
    """Experts with weights of their own in one tensor each, routed by a softmax over the experts."""

    draws = (one_of(2, 3), one_of(4, 6), one_of("plain", "gate", "norm", "heads"), one_of("soft", "best", "own bias"))
    axes = (LINES,)

    def setup(self, width: int, count: int, hidden: int, form: str, routing: str) -> None:
        self.form, self.routing, self.router = form, routing, nn.Linear(width, count)
        rows = 2 * hidden if form == "gate" else hidden
        self.up = nn.Parameter(torch.randn(count, rows, width) / width**0.5)
        self.down = nn.Parameter(torch.randn(count, width, hidden) / hidden**0.5)
        self.bias = nn.Parameter(torch.randn(count, rows)) if routing == "own bias" else None

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.einsum("blw,ehw->bleh", x, self.up)
        if self.bias is not None:
            inner = inner + self.bias
        shares = self.router(x).softmax(-1)
        if self.routing == "best":
            shares = shares * (shares == shares.amax(-1, keepdim=True))
        outs = torch.einsum("bleh,ewh->blew", self.changed(inner), self.down)
        return x + (outs * shares.unsqueeze(-1)).sum(2)

    def changed(self, inner: Tensor) -> Tensor:
        if self.form == "gate":
            gate, value = inner.chunk(2, -1)
            return F.silu(gate) * value
        if self.form == "norm":
            return F.relu(inner) / (inner.square().mean(-1, keepdim=True) + 0.1).sqrt()
        if self.form == "heads":
            # Hidden neurons of an expert in pairs: families two levels deep.
            return inner.unflatten(-1, (-1, 2)).softmax(-1).flatten(-2)
        return torch.relu(inner)


class ListedExperts(Block):
    """Experts that are modules of their own, all of which every token sees."""

    draws = (one_of(2, 3), one_of(4, 6), st.booleans())
    axes = (LINES,)

    def setup(self, width: int, count: int, hidden: int, is_shared: bool) -> None:
        self.router = nn.Linear(width, count)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)) for _ in range(count)
        )
        self.shared = nn.Linear(width, width) if is_shared else None

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        outs = torch.stack([expert(x) for expert in self.experts], -1)
        mixed = (outs * shares.unsqueeze(-2)).sum(-1)
        return mixed if self.shared is None else mixed + self.shared(x)


class GroupedQueries(Block):
    """Attention in which several query heads share a key head, with or without rotations of the queries and keys."""

    draws = (one_of((4, 2), (6, 2), (6, 3), (4, 1)), one_of("none", "halves", "pairs"), st.booleans(), st.booleans())
    axes = (LINES,)

    def setup(self, width: int, heads: tuple[int, int], rotation: str, is_added: bool, has_norm: bool) -> None:
        self.share, self.rotation, self.is_added, self.inside = heads[0] // heads[1], rotation, is_added, 4
        self.query = nn.Linear(width, heads[0] * self.inside, bias=False)
        self.key, self.value = (nn.Linear(width, heads[1] * self.inside, bias=False) for _ in range(2))
        self.last = nn.Linear(heads[0] * self.inside, width)
        self.norm = nn.RMSNorm(width, eps=1e-3) if has_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        read = self.norm(x)
        query, key, value = (
            layer(read).unflatten(-1, (-1, self.inside)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        query, key = self.rotated(query), self.rotated(key)
        key, value = (part.repeat_interleave(self.share, 1) for part in (key, value))
        scores = (query @ key.transpose(-1, -2) / self.inside**0.5).softmax(-1)
        out = self.last((scores @ value).transpose(1, 2).flatten(2))
        return x + out if self.is_added else out

    def rotated(self, heads: Tensor) -> Tensor:
        if self.rotation == "none":
            return heads
        half = self.inside // 2
        angles = torch.arange(heads.shape[-2], dtype=heads.dtype)[:, None] / (1 + torch.arange(half, dtype=heads.dtype))
        if self.rotation == "halves":
            one, other = heads.split(half, -1)
            return torch.cat([one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin()], -1)
        one, other = heads[..., ::2], heads[..., 1::2]
        turned = (one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin())
        return torch.stack(turned, -1).flatten(-2)


class GroupsInGroups(Block):
    """Features as groups of groups: what is done inside the inner ones, and inside the outer ones."""

    draws = (
        one_of((2, 2), (2, 3), (3, 2)),
        one_of("norm", "softmax", "own", "shared", "none"),
        one_of("norm", "maximum", "own", "mean"),
        st.booleans(),
    )

    def setup(self, width: int, groups: tuple[int, int], inner: str, outer: str, is_added: bool) -> None:
        self.groups, self.forms, self.is_added = groups, (inner, outer), is_added
        size = width // (groups[0] * groups[1])
        self.first, self.last = linear(self.axis, width, width), linear(self.axis, width, width)
        self.own = nn.Parameter(torch.randn(*groups, size, size) / size**0.5)
        self.shared = nn.Parameter(torch.randn(size, size) / size**0.5)
        self.between = nn.Parameter(torch.randn(groups[0], groups[1], groups[1]))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.first(x).movedim(self.axis, -1).unflatten(-1, (*self.groups, -1))
        parts = self.outside(self.inside(parts))
        out = self.last(torch.relu(parts.flatten(-3).movedim(-1, self.axis)))
        return x + out if self.is_added else out

    def inside(self, parts: Tensor) -> Tensor:
        form = self.forms[0]
        if form == "norm":
            return parts / (parts.square().mean(-1, keepdim=True) + 0.1).sqrt()
        if form == "softmax":
            return parts.softmax(-1)
        if form == "own":
            return torch.einsum("...pqi,pqio->...pqo", parts, self.own)
        return parts @ self.shared if form == "shared" else parts

    def outside(self, parts: Tensor) -> Tensor:
        form = self.forms[1]
        if form == "norm":
            return parts / (parts.square().mean((-2, -1), keepdim=True) + 0.1).sqrt()
        if form == "maximum":
            return parts - parts.amax(-2, keepdim=True)
        if form == "own":
            return torch.einsum("...pqi,pqr->...pri", parts, self.between)
        return parts - parts.mean((-2, -1), keepdim=True)
