"""Blocks that join, cut, move and repeat features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from random_networks.block import ACTIVATIONS, LINES, WIDTHS, Block, fit, linear, one_of


class Linear(Block):
    draws = (one_of(*WIDTHS), one_of(*ACTIVATIONS), st.booleans())

    def setup(self, width: int, out: int, activation: str, bias: bool) -> None:
        self.layer, self.activation, self.width = linear(self.axis, width, out, bias), ACTIVATIONS[activation](), out

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.layer(x))


class Hidden(Block):
    """Two layers with a width of their own between them."""

    draws = (one_of(6, 8, 18),)

    def setup(self, width: int, hidden: int) -> None:
        self.first, self.last = linear(self.axis, width, hidden), linear(self.axis, hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


class Residual(Block):
    chains = 1

    def setup(self, width: int, chain: Any) -> None:
        self.branch = self.fitted(chain, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Twice(Block):
    """One module at two places."""

    draws = (one_of("after", "beside"),)
    chains = 1

    def setup(self, width: int, form: str, chain: Any) -> None:
        self.form, self.branch = form, self.fitted(chain, width)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch(x)
        return self.branch(torch.tanh(once)) if self.form == "after" else once + self.branch(torch.sin(x))


class Join(Block):
    """Two branches meet entry by entry."""

    draws = (one_of("add", "multiply", "maximum", "where"),)
    chains = 2

    def setup(self, width: int, form: str, first: Any, second: Any) -> None:
        self.form, self.width = form, first[1]
        self.first, self.second = first[0], self.fitted(second, first[1])

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.first(x), self.second(x)
        if self.form == "where":
            return torch.where(one > 0, one, other)
        return {"add": torch.add, "multiply": torch.mul, "maximum": torch.maximum}[self.form](one, torch.tanh(other))


class Concatenate(Block):
    draws = (one_of(*WIDTHS),)
    chains = 2

    def setup(self, width: int, out: int, first: Any, second: Any) -> None:
        together = first[1] + second[1]
        self.width = together if together in WIDTHS else out
        self.first, self.second, self.last = first[0], second[0], fit(self.axis, together, self.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.first(x), self.second(x)], self.axis))


class Regroup(Block):
    """Features are split and come together in another way."""

    draws = (one_of(2, 3, 4, 6), st.integers(0, 5), one_of("turn", "reverse", "stack", "sum", "mix", "drop", "add"))

    def setup(self, width: int, count: int, turn: int, form: str) -> None:
        self.count, self.turn, self.form, part = count, turn % count, form, width // count
        self.layer = linear(self.axis, part, part) if form == "mix" else None
        self.last = fit(self.axis, part * (count - (form == "drop")), width) if form in ("drop", "add") else None

    def forward(self, x: Tensor) -> Tensor:
        parts = list(x.chunk(self.count, self.axis))
        parts = parts[self.turn :] + parts[: self.turn]
        if self.form == "stack":
            return torch.stack(parts, self.axis + 1).flatten(self.axis, self.axis + 1)
        if self.form == "sum":
            return torch.cat([torch.stack(parts).sum(0)] * self.count, self.axis)
        if self.layer is not None:
            parts[1] = self.layer(torch.tanh(parts[0])) + parts[1]
        if self.form == "add" and self.last is not None:
            parts[0] = parts[0] * torch.sigmoid(parts[1])
        if self.form == "drop" and self.last is not None:
            return self.last(torch.cat(parts[1:], self.axis))
        return torch.cat(parts[::-1] if self.form == "reverse" else parts, self.axis)


class Shuffle(Block):
    draws = (one_of(2, 3, 4, 6),)

    def setup(self, width: int, groups: int) -> None:
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        split = x.unflatten(self.axis, (self.groups, -1))
        return split.transpose(self.axis, self.axis + 1).flatten(self.axis, self.axis + 1)


class Slice(Block):
    """A stretch of features is cut out, at any place."""

    draws = (st.integers(1, 6), st.integers(2, 8), one_of("pad", "shift", "turn", "replace", "add", "stride"))

    def setup(self, width: int, start: int, count: int, form: str) -> None:
        self.start, self.count, self.form = start, min(count, width - start - 1), form
        self.layer = linear(self.axis, self.count, self.count) if form == "replace" else None
        if form in ("add", "stride"):
            kept = self.count if form == "add" else width // 2
            self.layer, self.last = linear(self.axis, width, kept), linear(self.axis, kept, width)

    def forward(self, x: Tensor) -> Tensor:
        sizes = [self.start, self.count, x.shape[self.axis] - self.start - self.count]
        before, inside, after = x.split(sizes, self.axis)
        if self.form == "turn":
            return torch.cat([inside, after, before], self.axis)
        if self.form in ("pad", "shift"):
            pad = [0, 0] * (x.ndim - 1 - self.axis) + ([sizes[0], sizes[2]] if self.form == "pad" else sizes[::2][::-1])
            return F.pad(inside, pad) + torch.tanh(x)
        if self.form == "replace" and self.layer is not None:
            return torch.cat([before, self.layer(torch.tanh(inside)), after], self.axis)
        if self.form == "stride":
            inside = x[..., ::2] if self.axis == LINES else x[:, ::2]
        return self.last(torch.relu(inside + self.layer(x))) if self.layer is not None else x


class Repeat(Block):
    """Half of the features, two times."""

    draws = (one_of("cat", "interleave", "repeat", "expand"), st.booleans())

    def setup(self, width: int, form: str, is_added: bool) -> None:
        self.form, self.is_added = form, is_added

    def forward(self, x: Tensor) -> Tensor:
        half = x.narrow(self.axis, 0, x.shape[self.axis] // 2)
        if self.form == "cat":
            whole = torch.cat([half, half], self.axis)
        elif self.form == "interleave":
            whole = half.repeat_interleave(2, self.axis)
        elif self.form == "repeat":
            whole = half.repeat(*(2 if axis == self.axis else 1 for axis in range(x.ndim)))
        else:
            sizes = [*x.shape[: self.axis], 2, *half.shape[self.axis :]]
            whole = half.unsqueeze(self.axis).expand(sizes).flatten(self.axis, self.axis + 1)
        return whole + x if self.is_added else whole
