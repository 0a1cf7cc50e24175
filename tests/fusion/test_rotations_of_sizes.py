"""Transformers of different sizes where streams and heads may be rotated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rotating import LENGTH, TOKENS, VOCABULARY, apart, planted_copy, seeded
from torch import Tensor, nn

from mergekit_ot import fuse
from mergekit_ot.errors import SolverError

pytestmark = pytest.mark.slow

SOLVER, INNER = "weight-matching", 4


class Block(nn.Module):
    """A language model of one layer, of any sizes: ``gpt`` (LayerNorm, positions, biases) or ``llama``."""

    def __init__(self, kind: str, heads: int = 2, neurons: int = 6, width: int = 8) -> None:
        super().__init__()
        self.count, self.is_rotary = heads, kind == "llama"
        norm = nn.RMSNorm if self.is_rotary else nn.LayerNorm
        self.embedding, self.head = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY, bias=False)
        self.norms = nn.ModuleList(norm(width) for _ in range(3))
        bias = not self.is_rotary
        self.q, self.k, self.v = (nn.Linear(width, INNER * heads, bias=bias) for _ in range(3))
        self.o = nn.Linear(INNER * heads, width, bias=bias)
        self.up, self.down = nn.Linear(width, neurons), nn.Linear(neurons, width)
        angles = torch.outer(torch.arange(LENGTH), torch.tensor([1.0, 0.3])).repeat(1, 2)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def turned(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cosine + torch.cat([-second, first], -1) * self.sine

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        n = self.norms[0](x)
        q, k, v = (part(n).unflatten(-1, (self.count, INNER)).transpose(1, 2) for part in (self.q, self.k, self.v))
        if self.is_rotary:
            q, k = self.turned(q), self.turned(k)
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return self.head(self.norms[2](x))


SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "more neurons": ({"neurons": 9}, {}),
    "fewer neurons": ({"neurons": 5}, {}),
    "more heads": ({"heads": 3}, {}),
    "fewer heads": ({"heads": 1}, {}),
    "more of both": ({"heads": 3, "neurons": 9}, {}),
}


@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("name", [name for name in SIZES if name != "fewer heads"])
def test_sources_of_other_sizes_are_fused(kind: str, name: str) -> None:
    models = [seeded(lambda sizes=sizes: Block(kind, **sizes), seed) for seed, sizes in enumerate(SIZES[name], 1)]
    result = fuse(models, solver=SOLVER, example_inputs=TOKENS)
    assert result.model()(TOKENS).isfinite().all()
    # The stream and two spaces rotate, whatever the sizes beside them.
    assert len(result.alignment.rotations) == 3
    # The source of the fused sizes computes what it did.
    assert apart(models[0], result.models.target.instance(result.aligned_state(0)), TOKENS) < 1e-9


@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("width", [6, 12])
def test_streams_of_other_widths_are_refused_in_words(kind: str, width: int) -> None:
    models = [seeded(lambda each=each: Block(kind, width=each), 1) for each in (width, 8)]
    with pytest.raises(SolverError, match="symmetry=permutation"):
        fuse(models, solver=SOLVER, example_inputs=TOKENS)


@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("doubled", ["neurons", "heads"])
def test_a_network_whose_units_stand_twice_is_fused_with_the_smaller_one(kind: str, doubled: str) -> None:
    small = seeded(lambda: Block(kind), 1)
    large = Block(kind, **{doubled: 2 * {"neurons": 6, "heads": 2}[doubled]}).double().eval()
    state = dict(small.state_dict())
    makers, reader = (("up",), "down") if doubled == "neurons" else (("q", "k", "v"), "o")
    for maker in makers:
        for name in (f"{maker}.weight", f"{maker}.bias"):
            if name in state:
                state[name] = torch.cat([state[name]] * 2)
    state[f"{reader}.weight"] = torch.cat([state[f"{reader}.weight"]] * 2, 1) / 2
    large.load_state_dict(state)
    assert apart(small, large, TOKENS) < 1e-9
    rotated = planted_copy(small, lambda: Block(kind), TOKENS)
    result = fuse([large, rotated], solver=SOLVER, example_inputs=TOKENS)
    assert apart(small, result.model(), TOKENS) < 1e-6
