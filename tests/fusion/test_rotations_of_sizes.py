"""Transformers of different sizes where streams and heads may be rotated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rotating import TOKENS, Decoder, apart, planted_copy, seeded

from mergekit_ot import fuse
from mergekit_ot.errors import SolverError

pytestmark = pytest.mark.slow

SOLVER = "weight-matching"

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
@pytest.mark.parametrize("width", [6, 16])
def test_streams_of_other_widths_are_refused_in_words(kind: str, width: int) -> None:
    models = [seeded(lambda each=each: decoder(kind, width=each), 1) for each in (width, 8)]
    with pytest.raises(SolverError, match="symmetry=permutation"):
        fuse(models, solver=SOLVER, example_inputs=TOKENS)


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
