"""Fusions that only reorder the neurons of a transformer say what would do more, and only those."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rotating import MODELS, ROWS, TOKENS, Decoder, PostNorm
from torch import Tensor, nn

from mergekit_ot import PluginManager, fuse, trace_model
from mergekit_ot.fusion.normalising import told_of_ties
from mergekit_ot.graph.symmetry.rotations import has_streams_or_heads
from mergekit_ot.hooks.symmetries import build_symmetries

IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """Blocks of two layers behind a norm, or of one layer whose activation is added to the stream."""

    def __init__(self, is_linear: bool) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.up, self.down = nn.Linear(6, 7), nn.Linear(7, 6)
        self.own, self.is_linear = nn.Linear(6, 6), is_linear

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        branch = self.down(self.up(self.norm(x)).relu()) if self.is_linear else self.own(self.norm(x)).relu()
        return self.last(self.norm(x + branch))


class Convolutions(nn.Module):
    """Images through a stream of convolutions channel by channel, with norms along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        branch = self.down(self.up(self.norm(self.depthwise(x).movedim(1, -1))).relu())
        return self.head((x.movedim(1, -1) + branch).mean((1, 2))).softmax(-1)


class Grouped(nn.Module):
    """Grouped convolutions, and a softmax of the classes: families, and no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 6, 1, groups=2), nn.Conv2d(6, 4, 1, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).mean((2, 3))).softmax(-1)


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3), nn.Softmax(-1))


WITH: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    **MODELS,
    "heads behind a norm behind the sum": (PostNorm, ROWS),
    "a stream without heads": (lambda: Residual(is_linear=True), VECTORS),
}
WITHOUT: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "norms between layers": (normed, VECTORS),
    "a stream of activations": (lambda: Residual(is_linear=False), VECTORS),
    "convolutions": (Convolutions, IMAGES),
    "grouped convolutions": (Grouped, IMAGES),
}


@pytest.mark.parametrize("name", [*WITH, *WITHOUT])
def test_streams_and_heads_are_seen_where_they_are(name: str) -> None:
    make, inputs = (WITH | WITHOUT)[name]
    assert has_streams_or_heads(trace_model(make(), inputs)) is (name in WITH)


def told(make: Callable[[], nn.Module], inputs: Tensor, **options: object) -> list[str]:
    result = fuse([make().eval(), make().eval()], example_inputs=inputs, **options)
    return [sentence for sentence in result.warnings if "may be rotated" in sentence]


@pytest.mark.parametrize(
    ("options", "is_told"),
    [
        ({"solver": "wb"}, True),
        ({"solver": "gwb"}, True),
        ({"solver": "weight-matching", "solver_options": {"symmetry": "permutation"}}, True),
        ({"solver": "weight-matching"}, False),
        ({"solver": "average"}, False),
        ({"solver": "wb", "repair": "rescale"}, False),
    ],
    ids=str,
)
def test_a_fusion_that_only_reorders_says_what_does_more(options: dict, is_told: bool) -> None:
    sentences = told(Decoder, TOKENS, **options)
    assert len(sentences) == is_told
    for sentence in sentences:
        assert f"'{options['solver']}'" in sentence
        assert "--solver weight-matching" in sentence
        assert "--repair refit" in sentence


def test_other_networks_are_not_told() -> None:
    assert told(normed, VECTORS, solver="wb") == []


@pytest.mark.slow
@pytest.mark.parametrize(("is_tied", "count"), [(True, 1), (False, 0)])
def test_what_a_tie_withholds_is_told_of_tied_networks(is_tied: bool, count: int) -> None:
    make = lambda: Decoder(is_tied=is_tied, layers=1)  # noqa: E731
    symmetries = build_symmetries(PluginManager.load())
    trace = lambda module: trace_model(module, TOKENS)  # noqa: E731
    sentences = told_of_ties(make, trace(make()), (TOKENS,), trace, symmetries)
    assert len(sentences) == count
    assert all("'head.weight'" in each and "orthogonal with fixed mean" in each for each in sentences)
