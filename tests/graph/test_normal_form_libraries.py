"""Normal forms of the transformers library's models, counted by hand."""

from __future__ import annotations

import pytest
import torch
from architectures import samples
from library import library_sample
from normal_nets import change, found, random_state

from mergekit_ot.graph.normal_form.rewrites import Centre, Fold, MoveBias

pytestmark = pytest.mark.slow

pytest.importorskip("transformers")


# Network → how many gains are folded, biases moved and streams centred in part or whole, and the allowed change:
# several compute their norms in single precision whatever they are given.
CASES = {
    "gpt2_tied": (4, 2, 1, 1e-10),
    "gpt2_eager": (2, 1, 1, 1e-10),
    "llama": (5, 0, 0, 1e-5),
    "gemma2": (4, 0, 0, 1e-5),
    "t5": (11, 0, 0, 1e-5),
    "opt": (5, 4, 1, 1e-10),
    "vit": (5, 4, 1, 1e-10),
    # An encoder's two norms before its last and the last, three of the decoder: its own last one is tied to the words.
    "whisper": (6, 3, 2, 1e-10),
}


@pytest.mark.parametrize("name", CASES)
def test_models_of_the_library(name):
    folds, moves, centres, tolerance = CASES[name]
    sample = library_sample(name)
    form = found(sample.make, sample.inputs())
    kinds = [type(rewrite) for rewrite in form.rewrites]
    assert (kinds.count(Fold), kinds.count(MoveBias), kinds.count(Centre)) == (folds, moves, centres)
    state = random_state(sample.make)
    new = form.of_state(state)
    assert change(sample.make, state, new, sample.inputs()) <= tolerance
    again = form.of_state(new)
    assert all(torch.allclose(again[key], new[key], rtol=0, atol=1e-12) for key in new)


@pytest.mark.parametrize(
    ("name", "norm"),
    [("gpt2_tied", "ln_f.weight"), ("gemma2", "model.norm.weight"), ("t5", "decoder.final_layer_norm.weight")],
)
def test_a_tied_head_is_the_reason(name, norm):
    sample = library_sample(name)
    (reason,) = [r.reason for r in found(sample.make, sample.inputs()).refusals if r.parameter.endswith(norm)]
    assert "Untied" in reason


def test_norms_of_queries_and_keys_are_refused():
    sample = samples("transformers_language")["qwen3"]
    refused = {refusal.parameter for refusal in found(sample.make, sample.inputs()).refusals}
    assert {f"model.model.layers.{n}.self_attn.{m}_norm.weight" for n in (0, 1) for m in "qk"} <= refused


def test_post_norm_is_refused():
    sample = samples("transformers_language")["bert_classifier"]
    form = found(sample.make, sample.inputs())
    inner = [r.parameter for r in form.refusals if "LayerNorm.weight" in r.parameter]
    # The embedding's, and two per layer but the last, which only the head reads.
    assert len(inner) == 4
    assert not form.centred
