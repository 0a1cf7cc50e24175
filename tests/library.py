"""Small networks of the transformers library, by name."""

from __future__ import annotations

from typing import Any

import torch
from architectures import samples
from architectures.base import Sample
from architectures.wrapped import Output, build


def _whisper() -> Output:
    sizes: dict[str, Any] = {"vocab_size": 37, "num_mel_bins": 10, "d_model": 24, "max_source_positions": 7}
    layers: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 1, "max_target_positions": 7}
    heads: dict[str, Any] = {"encoder_attention_heads": 3, "decoder_attention_heads": 3}
    wide: dict[str, Any] = {"encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "begin_suppress_tokens": None}
    special: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
    model = build("WhisperForConditionalGeneration", "WhisperConfig", **sizes, **layers, **heads, **wide, **special)
    return Output(model, "logits", ("input_features", "decoder_input_ids"), use_cache=False)


def _whisper_inputs() -> tuple[object, ...]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 10, 14, generator=generator), torch.randint(37, (2, 5), generator=generator)


def library_sample(name: str) -> Sample:
    if name == "whisper":
        return Sample(_whisper, _whisper_inputs)
    return next(
        found for which in ("transformers_language", "transformers_vision") if (found := samples(which).get(name))
    )
