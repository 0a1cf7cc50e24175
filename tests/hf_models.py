"""Small networks of the transformers library, saved by the library as folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 37
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
_PLAIN = {**_TEXT, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40}
_GROUPED = {
    **_TEXT,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
}
_PIXELS: dict[str, Any] = {"image_size": 16, "patch_size": 8, "num_hidden_layers": 2, "initializer_range": 0.2}
_PIXELS |= {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40}
_T5 = {"vocab_size": VOCABULARY, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3}
_T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}
_WHISPER: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 24, "num_mel_bins": 8, "max_source_positions": 12}
_WHISPER |= {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 3, "decoder_attention_heads": 3}
_WHISPER |= {"encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "max_target_positions": 16, "init_std": 0.2}
_WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
_WHISPER |= {"suppress_tokens": None, "begin_suppress_tokens": None}

# Name → class, class of the configuration, its settings.
NETWORKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "llama_tied": ("LlamaForCausalLM", "LlamaConfig", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_GROUPED, "sliding_window": None}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 3}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 24}),
    "bert": ("BertForMaskedLM", "BertConfig", _PLAIN),
    "bert_bare": ("BertModel", "BertConfig", _PLAIN),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**_PLAIN, "num_labels": 3}),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", _WHISPER),
    "vit": ("ViTForImageClassification", "ViTConfig", {**_PIXELS, "num_labels": 3}),
    "dinov2": ("Dinov2Model", "Dinov2Config", {**_PIXELS, "mlp_ratio": 2}),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**_PLAIN, "projection_dim": 20}, "vision_config": {**_PIXELS, "projection_dim": 20}}
        | {"projection_dim": 20},
    ),
}
NETWORKS["gpt2"][2].update(n_layer=2, n_head=3, bos_token_id=1, eos_token_id=2, initializer_range=0.2)


def fresh(name: str, seed: int, **sizes: Any) -> Any:
    """Returns a random network of the library, in float32."""
    import transformers

    kind, config, settings = NETWORKS[name]
    torch.manual_seed(seed)
    return getattr(transformers, kind)(getattr(transformers, config)(**{**settings, **sizes})).eval()


def saved(
    name: str, seed: int, folder: Path, kind: torch.dtype = torch.float32, shard: str = "1GB", **sizes: Any
) -> Path:
    """Saves a random network as the library does it."""
    model = fresh(name, seed, **sizes).to(kind)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def loaded(name: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Returns what the library makes of a folder, in float32, and what it missed."""
    import transformers

    kind = getattr(transformers, NETWORKS[name][0])
    model, info = kind.from_pretrained(folder.absolute(), output_loading_info=True, dtype=torch.float32)
    return model.eval(), info


def network_of(checkpoint: Any) -> Any:
    """Returns a fresh network of a folder that was read."""
    assert checkpoint.build is not None, checkpoint.found
    return checkpoint.build()


def named_inputs(name: str) -> dict[str, Tensor]:
    """Returns inputs of a network by keyword, not those that it is traced at."""
    generator = torch.Generator().manual_seed(5)

    def tokens(length: int) -> Tensor:
        return torch.randint(3, VOCABULARY, (3, length), generator=generator)

    pixels, sound = torch.randn(3, 3, 16, 16, generator=generator), torch.randn(3, 8, 24, generator=generator)
    match name:
        case "t5":
            return {"input_ids": tokens(6), "decoder_input_ids": tokens(4)}
        case "whisper":
            return {"input_features": sound, "decoder_input_ids": tokens(4)}
        case "vit" | "dinov2":
            return {"pixel_values": pixels}
        case "clip":
            ids = tokens(6)
            ids[:, -1] = 2  # where a text ends
            return {"input_ids": ids, "pixel_values": pixels}
    return {"input_ids": tokens(6)}


def outputs(model: Callable[..., Any], name: str) -> list[Tensor]:
    """Returns all numbers that a network of the library gives, without states inside."""
    with torch.no_grad():
        output = model(**named_inputs(name))
    names = ("logits", "logits_per_image", "last_hidden_state", "pooler_output")
    chosen = [output[key] for key in names if isinstance(output.get(key), Tensor)]
    return chosen[:1] if "logits" in output or "logits_per_image" in output else chosen


def apart(first: Callable[..., Any], second: Callable[..., Any], name: str) -> float:
    """Returns how far the outputs of two networks are apart, relative to their size."""
    pairs = zip(outputs(first, name), outputs(second, name), strict=True)
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)
