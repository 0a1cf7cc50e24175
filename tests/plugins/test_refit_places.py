"""Laws of the refit where places are taken, moved or averaged between a norm and what reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from mergeot_repair.refit.refit import RefitRepair
from torch import Tensor, nn
from torch.nn import functional

from mergekit_ot import fuse

_LENGTH, _WIDTH = 6, 8
_READ = {
    "before": lambda norm, stream: norm(stream[:, 0]),
    "behind": lambda norm, stream: norm(stream)[:, 0],
    "mean": lambda norm, stream: norm(stream).mean(1),
    "all": lambda norm, stream: norm(stream),
    "rolled": lambda norm, stream: norm(stream).roll(2, 1),
    "in squares": lambda norm, stream: norm(stream).unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2),
}


class _Net(nn.Module):
    """A class token, places, a block of attention and one of neurons, and a head that reads as it is told."""

    def __init__(self, seed: int, norm: str, read: str) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.read = _READ[read]
        self.embedding = nn.Linear(5, _WIDTH)
        self.places = nn.Parameter(torch.randn(_LENGTH, _WIDTH))
        kind = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[norm]
        self.norms = nn.ModuleList(kind(_WIDTH) for _ in range(3))
        self.q, self.k, self.v, self.o = (nn.Linear(_WIDTH, _WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(_WIDTH, 12), nn.Linear(12, _WIDTH)
        self.head = nn.Linear(_WIDTH, 4)
        for parameter in self.norms.parameters():
            nn.init.normal_(parameter, float(parameter.detach().mean()), 0.2)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.embedding(x) + self.places
        read = self.norms[0](stream)
        q, k, v = (each(read).unflatten(-1, (2, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        made = functional.scaled_dot_product_attention(q, k, v)
        stream = stream + self.o(made.transpose(1, 2).flatten(2))
        stream = stream + self.down(functional.gelu(self.up(self.norms[1](stream))))
        return self.head(self.read(self.norms[2], stream))


def _inputs(count: int, seed: int) -> Tensor:
    return torch.randn(count, _LENGTH, 5, generator=torch.Generator().manual_seed(seed))


def _refitted(nets: Sequence[nn.Module]) -> nn.Module:
    inputs = _inputs(600, 3)
    result = fuse(list(nets), solver="average", example_inputs=inputs[:50], device="cpu")
    weights = tuple(1 / len(nets) for _ in nets)
    notes: list[str] = []
    context = replace(
        result.repair_context(result.state, weights, [(batch,) for batch in inputs.split(50)]), note=notes.append
    )
    fused = context.instance(RefitRepair().repair(context))
    assert any("1 stream" in note for note in notes)
    return fused


def _outputs(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net(_inputs(200, 9))


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_token_is_taken_behind_a_norm_as_before_it(norm: str) -> None:
    before, behind = (_refitted([_Net(seed, norm, read) for seed in (0, 1)]) for read in ("before", "behind"))
    assert torch.allclose(_outputs(before), _outputs(behind), atol=1e-4)


@pytest.mark.parametrize("read", ["rolled", "in squares"])
def test_places_in_another_order_are_the_same_places(read: str) -> None:
    plain, moved = (_refitted([_Net(seed, "layer", each) for seed in (0, 1)]) for each in ("all", read))
    expected = _READ[read](nn.Identity(), _outputs(plain))
    assert torch.allclose(_outputs(moved), expected, atol=1e-4)


def test_a_mean_over_places_is_refitted() -> None:
    nets = [_Net(seed, "layer", "mean") for seed in (0, 1)]
    wanted = torch.stack([_outputs(net) for net in nets]).mean(0)
    fused = (_outputs(_refitted(nets)) - wanted).square().mean()
    assert fused < 0.6 * min((_outputs(net) - wanted).square().mean() for net in nets)
    assert torch.allclose(_outputs(_refitted(nets[:1] * 2)), _outputs(nets[0]), atol=1e-2)
