"""What is kept of transformers, whose streams rotate: vocabularies of other sizes, tied and not."""

from __future__ import annotations

import pytest
import torch
from rotating import MODELS, Decoder
from torch import nn

from mergekit_ot import fuse

pytestmark = pytest.mark.slow

TOKENS = MODELS["llama"][1] % 23


def decoder(seed: int, vocabulary: int, *, is_tied: bool) -> nn.Module:
    """A language model whose stream rotates, with a vocabulary of its own."""
    torch.manual_seed(seed)
    model = Decoder("llama", layers=1)
    width = model.head.in_features
    model.embedding, model.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary, bias=False)
    if is_tied:
        model.head.weight = model.embedding.weight
    for norm in model.norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("is_tied", [False, True])
def test_streams_rotate_around_vocabularies_that_are_kept(is_tied: bool) -> None:
    models = [decoder(seed, vocabulary, is_tied=is_tied) for seed, vocabulary in enumerate((23, 29))]
    keep = ["embedding.*"] if is_tied else ["embedding.*", "head.*"]
    result = fuse(models, solver="weight-matching", example_inputs=TOKENS, keep=keep)
    assert torch.equal(result.state["embedding.weight"], models[0].state_dict()["embedding.weight"])
    assert result.aligned_state(1)["embedding.weight"].shape[0] == 29
    assert result.aligned_sources_max_error is not None
    assert result.aligned_sources_max_error < 1e-5
    if is_tied:
        assert torch.equal(result.state["head.weight"], result.state["embedding.weight"])


def test_all_kept_of_a_network_in_normal_form_is_its_function() -> None:
    models, tokens = [decoder(seed, 23, is_tied=False) for seed in range(2)], TOKENS
    result = fuse(models, solver="weight-matching", example_inputs=tokens, keep=["*=1"])
    assert torch.allclose(result.model()(tokens), models[1](tokens), atol=1e-5)
