"""Language models that the development does not look at: they measure what it reaches beyond its own samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from architectures.base import Sample, tokens
from architectures.wrapped import Output, build

_VOCABULARY = 37
_SPECIAL: dict[str, Any] = {"vocab_size": _VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TEXT: dict[str, Any] = {**_SPECIAL, "num_hidden_layers": 2, "max_position_embeddings": 16}
_NARROW: dict[str, Any] = {**_TEXT, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40}
_GROUPED: dict[str, Any] = {
    **_TEXT,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 44,
}
_GPT: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "n_layer": 2,
    "n_positions": 16,
    "n_inner": 40,
}


def _causal(family: str, **settings: Any) -> Sample:
    """Returns a decoder with a head over the vocabulary."""

    def make() -> Output:
        model = build(f"{family}ForCausalLM", f"{family}Config", **settings)
        return Output(model, "logits", ("input_ids",), use_cache=False)

    return Sample(make, tokens(_VOCABULARY))


def _classifier(family: str, **settings: Any) -> Sample:
    """Returns an encoder with a head over classes."""

    def make() -> Output:
        model = build(f"{family}ForSequenceClassification", f"{family}Config", num_labels=5, **settings)
        return Output(model, "logits", ("input_ids",))

    return Sample(make, tokens(_VOCABULARY))


def _masked(family: str, **settings: Any) -> Sample:
    """Returns an encoder with a head over the vocabulary."""
    return Sample(
        lambda: Output(build(f"{family}ForMaskedLM", f"{family}Config", **settings), "logits", ("input_ids",)),
        tokens(_VOCABULARY),
    )


def _gemma3() -> Output:
    settings: dict[str, Any] = {
        "head_dim": 6,
        "query_pre_attn_scalar": 6,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    model = build("Gemma3ForCausalLM", "Gemma3TextConfig", **_GROUPED, **settings)
    return Output(model, "logits", ("input_ids",), use_cache=False)


def _xlnet() -> Output:
    settings: dict[str, Any] = {"d_model": 24, "n_layer": 2, "n_head": 3, "d_inner": 40}
    model = build("XLNetLMHeadModel", "XLNetConfig", **_SPECIAL, **settings)
    return Output(model, "logits", ("input_ids",), use_mems=False)


def _bart() -> Output:
    settings: dict[str, Any] = {
        "d_model": 24,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 3,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 44,
        "max_position_embeddings": 16,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    }
    model = build("BartForConditionalGeneration", "BartConfig", **_SPECIAL, **settings)
    return Output(model, "logits", ("input_ids", "decoder_input_ids"), use_cache=False)


def _pair() -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    return tuple(torch.randint(_VOCABULARY, (2, length), generator=random) for length in (7, 5))


HELD_OUT_LANGUAGE: dict[str, Sample] = {
    "bloom": _causal("Bloom", **_SPECIAL, hidden_size=24, n_layer=2, n_head=3),
    "falcon": _causal(
        "Falcon", **_TEXT, hidden_size=24, num_attention_heads=3, ffn_hidden_size=40, multi_query=True, alibi=False
    ),
    "mpt": _causal("Mpt", vocab_size=_VOCABULARY, d_model=24, n_heads=3, n_layers=2, expansion_ratio=2, max_seq_len=16),
    "gptj": _causal("GPTJ", **_GPT, n_embd=24, n_head=3, rotary_dim=4),
    "codegen": _causal("CodeGen", **_GPT, n_embd=32, n_head=4, rotary_dim=4, n_ctx=16),
    "gpt_neo": _causal(
        "GPTNeo",
        **_SPECIAL,
        hidden_size=24,
        num_layers=2,
        num_heads=3,
        intermediate_size=40,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        max_position_embeddings=16,
    ),
    "gpt_bigcode": _causal("GPTBigCode", **_GPT, n_embd=32, n_head=4, pad_token_id=0),
    "stablelm": _causal("StableLm", **_GROUPED),
    "cohere": _causal("Cohere", **_GROUPED),
    "olmo2": _causal("Olmo2", **_GROUPED),
    "granite": _causal("Granite", **_GROUPED),
    "starcoder2": _causal("Starcoder2", **_GROUPED),
    "phi": _causal("Phi", **_NARROW),
    "gemma3": Sample(_gemma3, tokens(_VOCABULARY)),
    "glm4": _causal("Glm4", **_GROUPED, head_dim=8),
    "mistral": _causal("Mistral", **_GROUPED, head_dim=6, sliding_window=4),
    "nemotron": _causal("Nemotron", **_GROUPED, head_dim=12),
    "roberta": _masked("Roberta", **_NARROW),
    "electra": _classifier("Electra", **_NARROW, embedding_size=20),
    "albert": _masked("Albert", **_NARROW, embedding_size=20),
    "distilbert": _masked(
        "DistilBert",
        vocab_size=_VOCABULARY,
        pad_token_id=0,
        max_position_embeddings=16,
        n_layers=2,
        n_heads=3,
        dim=24,
        hidden_dim=40,
    ),
    "deberta_v2": _classifier(
        "DebertaV2",
        **_NARROW,
        relative_attention=True,
        position_buckets=4,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
    ),
    "mobilebert": _masked(
        "MobileBert",
        **_TEXT,
        hidden_size=40,
        num_attention_heads=3,
        intermediate_size=28,
        embedding_size=20,
        intra_bottleneck_size=24,
        num_feedforward_networks=2,
    ),
    "squeezebert": _classifier("SqueezeBert", **_NARROW, embedding_size=24),
    "convbert": _classifier(
        "ConvBert",
        **_TEXT,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=44,
        embedding_size=20,
        head_ratio=2,
        conv_kernel_size=3,
        num_groups=2,
    ),
    "fnet": _masked("FNet", **_TEXT, hidden_size=24, intermediate_size=40, tpu_short_seq_length=7),
    "xlnet": Sample(_xlnet, tokens(_VOCABULARY)),
    "modernbert": _masked("ModernBert", **_NARROW, cls_token_id=1, sep_token_id=2, local_attention=4),
    "bart": Sample(_bart, _pair),
    "rwkv": _causal(
        "Rwkv",
        vocab_size=_VOCABULARY,
        context_length=16,
        hidden_size=24,
        attention_hidden_size=20,
        intermediate_size=40,
        num_hidden_layers=2,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "mamba2": _causal(
        "Mamba2",
        **_SPECIAL,
        hidden_size=24,
        num_hidden_layers=2,
        num_heads=6,
        head_dim=8,
        n_groups=2,
        state_size=5,
        chunk_size=4,
    ),
    "recurrent_gemma": _causal(
        "RecurrentGemma",
        **_SPECIAL,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=44,
        lru_width=24,
        attention_window_size=8,
    ),
    "qwen3_moe": _causal(
        "Qwen3Moe", **_GROUPED, head_dim=6, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    "olmoe": _causal("Olmoe", **{**_GROUPED, "intermediate_size": 40}, num_experts=5, num_experts_per_tok=2),
}
