"""Transformers of different sizes where streams and heads may be rotated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attentions import OneBlock
from rotating import ROWS, TOKENS, WIDTH, Decoder, apart, planted_copy, seeded
from torch import Tensor, nn

from mergekit_ot import fuse
from mergekit_ot.errors import SolverError

pytestmark = pytest.mark.slow

SOLVER = "weight-matching"


class Spaces(nn.Module):
    """Attention of two heads of any size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, 2 * size) for _ in range(3))
        self.o = nn.Linear(2 * size, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "more neurons": ({"neurons": 12}, {}),
    "fewer neurons": ({"neurons": 5}, {}),
    "more heads": ({"heads": 3}, {}),
    "more of both": ({"heads": 3, "neurons": 12}, {}),
}


# Kind -> what is doubled -> the maps that make it, and the one that reads it.
MAPS = {
    "gpt": {"neurons": (("neurons.0.0",), "neurons.0.2")},
    "llama": {"neurons": (("neurons.0.gate", "neurons.0.up"), "neurons.0.down")},
}
HEADS = (("heads.0.q", "heads.0.k", "heads.0.v"), "heads.0.o")


def decoder(kind: str, **sizes: int) -> Decoder:
    return Decoder(kind, layers=1, **sizes)


@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("name", SIZES)
def test_sources_of_other_sizes_are_fused(kind: str, name: str) -> None:
    models = [seeded(lambda sizes=sizes: decoder(kind, **sizes), seed) for seed, sizes in enumerate(SIZES[name], 1)]
    result = fuse(models, solver=SOLVER, example_inputs=TOKENS)
    assert result.model()(TOKENS).isfinite().all()
    # The stream and two spaces rotate, whatever the sizes beside them.
    assert len(result.alignment.rotations) == 3
    # The source of the fused sizes computes what it did.
    assert apart(models[0], result.models.target.instance(result.aligned_state(0)), TOKENS) < 1e-9


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_streams_of_narrower_targets_are_refused_in_words(kind: str) -> None:
    models = [seeded(lambda each=each: decoder(kind, width=each), 1) for each in (6, 8)]
    with pytest.raises(SolverError, match="symmetry=permutation"):
        fuse(models, solver=SOLVER, example_inputs=TOKENS)


@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_narrower_stream_keeps_its_function_in_a_wider_one(kind: str, place: int) -> None:
    models = [seeded(lambda each=each: decoder(kind, width=each), each) for each in (12, 8)]
    models = models[::-1] if place else models
    weights = (0.0, 1.0) if place == 0 else (1.0, 0.0)
    target = decoder(kind, width=12).double()
    result = fuse(models, solver=SOLVER, example_inputs=TOKENS, target=target, model_weights=weights)
    assert result.check.is_exact
    assert result.check.is_telling
    for number, model in enumerate(models):
        assert apart(model, result.models.target.instance(result.aligned_state(number)), TOKENS) < 1e-9
    assert apart(models[1 - place], result.model(), TOKENS) < 1e-9


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_a_stream_that_stands_in_a_wider_one_is_found_there(kind: str) -> None:
    wide, narrow = (seeded(lambda each=each: decoder(kind, width=each), each) for each in (12, 8))
    embedded = decoder(kind, width=12).double().eval()
    embedded.load_state_dict(fuse([wide, narrow], solver=SOLVER, example_inputs=TOKENS).aligned_state(1))
    planted = planted_copy(embedded, lambda: decoder(kind, width=12), TOKENS)
    assert apart(planted, narrow, TOKENS) < 1e-9
    result = fuse([planted, narrow], solver=SOLVER, example_inputs=TOKENS)
    assert apart(narrow, result.model(), TOKENS) < 1e-6


def test_spaces_inside_heads_of_another_size_are_not_rotated() -> None:
    models = [seeded(lambda size=size: OneBlock(Spaces(size)), size) for size in (6, 4)]
    result = fuse(models, solver=SOLVER, example_inputs=ROWS)
    assert [result.alignment.target.groups[key].size for key in result.alignment.rotations] == [WIDTH]
    assert apart(models[0], result.models.target.instance(result.aligned_state(0)), ROWS) < 1e-6


@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("doubled", ["neurons", "heads"])
def test_a_network_whose_units_stand_twice_is_fused_with_the_smaller_one(kind: str, doubled: str) -> None:
    small = seeded(lambda: decoder(kind), 1)
    large = decoder(kind, **{doubled: 2 * {"neurons": 9, "heads": 2}[doubled]}).double().eval()
    state = dict(small.state_dict())
    makers, reader = {"heads": HEADS, **MAPS[kind]}[doubled]
    for name in (f"{maker}.{kind_of}" for maker in makers for kind_of in ("weight", "bias")):
        if name in state:
            state[name] = torch.cat([state[name]] * 2)
    state[f"{reader}.weight"] = torch.cat([state[f"{reader}.weight"]] * 2, 1) / 2
    large.load_state_dict(state)
    assert apart(small, large, TOKENS) < 1e-9
    rotated = planted_copy(small, lambda: decoder(kind), TOKENS)
    result = fuse([large, rotated], solver=SOLVER, example_inputs=TOKENS)
    assert apart(small, result.model(), TOKENS) < 1e-6
