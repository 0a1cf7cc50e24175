"""Language models of transformers: the ones that the development is allowed to look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from architectures.base import Sample, tokens
from architectures.wrapped import Output, build

_VOCABULARY = 37
_TEXT: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "num_hidden_layers": 2,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_NARROW: dict[str, Any] = {**_TEXT, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40}
_GROUPED: dict[str, Any] = {
    **_TEXT,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 44,
}
# A grouped product of matrices takes rows of whole 16 bytes, hence widths of experts that are multiples of 8.
_MIXTRAL: dict[str, Any] = {**_GROUPED, "intermediate_size": 40, "num_local_experts": 5}


def _causal(family: str, **settings: Any) -> Sample:
    """Returns a decoder with a head over the vocabulary."""

    def make() -> Output:
        model = build(f"{family}ForCausalLM", f"{family}Config", **settings)
        return Output(model, "logits", ("input_ids",), use_cache=False)

    return Sample(make, tokens(_VOCABULARY))


def _gpt2(layers: int, **settings: Any) -> Sample:
    def make() -> Output:
        sizes: dict[str, Any] = {"n_embd": 24, "n_head": 3, "n_inner": 40, "n_layer": layers, "n_positions": 16}
        special: dict[str, Any] = {"vocab_size": _VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
        model = build("GPT2LMHeadModel", "GPT2Config", **sizes, **special, **settings)
        return Output(model, "logits", ("input_ids",), use_cache=False)

    return Sample(make, tokens(_VOCABULARY))


def _encoder(model: str, config: str, output: str, **settings: Any) -> Sample:
    """Returns an encoder of one token sequence."""
    return Sample(
        lambda: Output(build(model, config, **settings), output, ("input_ids",)),
        tokens(_VOCABULARY),
    )


def _pair(source: int = 7, target: int = 5) -> Callable[[], tuple[Tensor, ...]]:
    """Returns what makes the token sequences of an encoder and a decoder."""

    def make() -> tuple[Tensor, ...]:
        random = torch.Generator().manual_seed(0)
        return tuple(torch.randint(_VOCABULARY, (2, length), generator=random) for length in (source, target))

    return make


def _t5() -> Output:
    sizes: dict[str, Any] = {"d_model": 24, "d_kv": 10, "d_ff": 40, "num_layers": 2, "num_heads": 3}
    relative: dict[str, Any] = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}
    model = build("T5ForConditionalGeneration", "T5Config", vocab_size=_VOCABULARY, **sizes, **relative)
    return Output(model, "logits", ("input_ids", "decoder_input_ids"), use_cache=False)


LANGUAGE: dict[str, Sample] = {
    "gpt2_tied": _gpt2(2),
    "gpt2_eager": _gpt2(1, attn_implementation="eager"),
    "llama": _causal("Llama", **_GROUPED),
    "llama_tied_eager": _causal("Llama", **_GROUPED, tie_word_embeddings=True, attn_implementation="eager"),
    "qwen2": _causal("Qwen2", **_GROUPED),
    "qwen3": _causal("Qwen3", **_GROUPED, head_dim=6),
    "phi3": _causal("Phi3", **_GROUPED, original_max_position_embeddings=16),
    "gemma2": _causal("Gemma2", **_GROUPED, head_dim=6, query_pre_attn_scalar=6, sliding_window=4),
    "gpt_neox": _causal("GPTNeoX", **_NARROW),
    "opt": _causal(
        "OPT",
        **_TEXT,
        hidden_size=24,
        num_attention_heads=3,
        ffn_dim=40,
        word_embed_proj_dim=20,
    ),
    "bert_classifier": _encoder("BertForSequenceClassification", "BertConfig", "logits", **_NARROW, num_labels=5),
    "bert_masked": _encoder("BertForMaskedLM", "BertConfig", "logits", **_NARROW),
    "t5": Sample(_t5, _pair()),
    "deepseek_v3": _causal(
        "DeepseekV3",
        **_TEXT,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=20,
        kv_lora_rank=12,
        qk_rope_head_dim=4,
        qk_nope_head_dim=6,
        v_head_dim=11,
        intermediate_size=52,
        moe_intermediate_size=24,
        n_routed_experts=6,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "mixtral": _causal("Mixtral", **_MIXTRAL),
    "mixtral_eager": _causal("Mixtral", **_MIXTRAL, experts_implementation="eager"),
    "clip_text": _encoder("CLIPTextModel", "CLIPTextConfig", "last_hidden_state", **_NARROW),
    "mamba": _causal(
        "Mamba",
        vocab_size=_VOCABULARY,
        hidden_size=24,
        num_hidden_layers=2,
        state_size=5,
        time_step_rank=3,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
