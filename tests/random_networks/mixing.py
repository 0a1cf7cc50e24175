"""Blocks that gate, convolve, normalise, average and tie."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from random_networks.block import IMAGES, LINES, WIDTHS, Block, linear, one_of


class Gate(Block):
    draws = (one_of("glu", "chunk", "view", "interleaved", "two"), one_of(*WIDTHS))

    def setup(self, width: int, form: str, out: int) -> None:
        self.form, self.width = form, out
        self.both = linear(self.axis, width, 2 * out) if form != "two" else None
        self.values, self.gates = (linear(self.axis, width, out) if form == "two" else None for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.values is not None and self.gates is not None:
            return self.values(x) * torch.sigmoid(self.gates(x))
        both = self.both(x) if self.both is not None else x
        if self.form == "glu":
            return F.glu(both, self.axis)
        if self.form == "chunk":
            one, other = both.chunk(2, self.axis)
        elif self.form == "view":
            one, other = both.unflatten(self.axis, (2, -1)).unbind(self.axis)
        else:
            one, other = both.unflatten(self.axis, (-1, 2)).unbind(self.axis + 1)
        return one * F.silu(other)


class Convolution(Block):
    draws = (one_of(1, 2, 3, 4, 6, 12), one_of(1, 3), one_of(*WIDTHS), st.booleans())

    def setup(self, width: int, groups: int, kernel: int, out: int, is_transposed: bool) -> None:
        self.width = out
        kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d) if is_transposed else (nn.Conv1d, nn.Conv2d)
        self.layer = kinds[self.axis == IMAGES](width, out, kernel, padding=kernel // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2)).transpose(1, 2) if self.axis == LINES else self.layer(x)


class Depthwise(Block):
    draws = (one_of(1, 2),)

    def setup(self, width: int, times: int) -> None:
        self.width = width * times if width * times in WIDTHS else width
        kind = nn.Conv1d if self.axis == LINES else nn.Conv2d
        self.layer = kind(width, self.width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2)).transpose(1, 2) if self.axis == LINES else self.layer(x)


class Norm(Block):
    draws = (one_of("group", "batch", "instance", "layer", "rms"), one_of(1, 2, 3, 4, 6))

    def setup(self, width: int, form: str, groups: int) -> None:
        self.form = form
        if form == "group":
            self.norm: nn.Module = nn.GroupNorm(groups, width)
        elif form == "batch":
            self.norm = nn.BatchNorm1d(width) if self.axis == LINES else nn.BatchNorm2d(width)
        elif form == "instance":
            self.norm = nn.InstanceNorm1d(width, affine=True) if self.axis == LINES else nn.InstanceNorm2d(width)
        else:
            self.norm = nn.LayerNorm(width) if form == "layer" else nn.RMSNorm(width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        if self.form in ("layer", "rms"):
            return self.norm(x.movedim(self.axis, -1)).movedim(-1, self.axis)
        return self.norm(x.transpose(1, 2)).transpose(1, 2) if self.axis == LINES else self.norm(x)


class Scale(Block):
    """Parameters are multiplied or added: one per feature, per group, or per place inside the groups."""

    draws = (one_of("features", "groups", "inside", "table"), one_of(2, 3, 4), st.booleans())

    def setup(self, width: int, form: str, groups: int, is_gain: bool) -> None:
        inside = width // groups
        shape = {"features": (width,), "groups": (groups, 1), "inside": (1, inside), "table": (groups, inside)}[form]
        self.form, self.groups, self.is_gain = form, groups, is_gain
        self.values = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        if self.form != "features":
            x = x.unflatten(self.axis, (self.groups, -1))
        values = self.along(self.values, x)
        x = x * values if self.is_gain else torch.tanh(x) + values
        return x if self.form == "features" else x.flatten(self.axis, self.axis + 1)


class Mean(Block):
    """Something of all places meets each of them."""

    draws = (one_of("expand", "centre", "excite", "film", "only"),)

    def setup(self, width: int, form: str) -> None:
        self.form = form
        self.layer = linear(self.axis, width, 2 * width if form == "film" else width)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(self.places(x), keepdim=True)
        if self.form in ("expand", "only"):
            return mean.expand_as(x) * (self.layer(x) if self.form == "expand" else 1)
        if self.form == "centre":
            return self.layer(x - mean)
        if self.form == "excite":
            return x * torch.sigmoid(self.layer(mean))
        gain, shift = self.layer(mean).chunk(2, self.axis)
        return x * torch.tanh(gain) + shift


class Order(Block):
    """What looks at the order of features or places."""

    draws = (one_of("flip", "roll", "cumsum", "pick", "softmax"), st.booleans())

    def setup(self, width: int, form: str, is_over_places: bool) -> None:
        self.form, self.over = form, 3 - self.axis if is_over_places else self.axis

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "flip":
            return x.flip(self.over)
        if self.form == "roll":
            return x.roll(1, self.over)
        if self.form == "cumsum":
            return x.cumsum(self.over)
        if self.form == "softmax":
            return x.softmax(self.over)
        return x + x.select(self.over, 1).unsqueeze(self.over)


class Tied(Block):
    """One weight is read in two ways."""

    draws = (one_of("transposed", "again", "shared", "symmetric", "gram", "halves", "low rank"), one_of(8, 12))
    axes = (LINES,)

    def setup(self, width: int, form: str, hidden: int) -> None:
        self.form, out = form, width if form in ("again", "shared", "symmetric", "gram") else hidden
        self.layer, self.bias = nn.Linear(width, out), nn.Parameter(torch.randn(width))
        if form == "shared":
            self.other = nn.Linear(width, width)
            self.other.weight = self.layer.weight
        if form == "low rank":
            self.down, self.up = (nn.Parameter(torch.randn(shape)) for shape in ((3, width), (width, 3)))
            self.whole = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight
        if self.form == "symmetric":
            return F.linear(x, weight + weight.t(), self.bias)
        if self.form == "gram":
            return F.linear(x, weight @ weight.t(), self.bias)
        if self.form == "low rank":
            return F.linear(x, self.whole.weight + self.up @ self.down, self.bias)
        inner = torch.tanh(self.layer(x))
        if self.form == "shared":
            return self.other(inner)
        if self.form == "halves":
            one, other = weight.chunk(2, 1)
            return torch.cat([F.linear(inner, one.t()), F.linear(inner, other.t())], -1) + self.bias
        return F.linear(inner, weight.t() if self.form == "transposed" else weight, self.bias)
