"""Small networks of the library transformers, one of each family; a GPT-2 and a ViT may have other sizes.

Several inputs stand one after the other. Names in their states are those of the library, so that its files are read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn

# No symbol has a meaning of its own to the library.
_SPECIAL = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
_WIDTH, _INNER, _HEADS, _LAYERS = 64, 128, 4, 2
_SIZES: dict[str, Any] = {
    "hidden_size": _WIDTH,
    "intermediate_size": _INNER,
    "num_attention_heads": _HEADS,
    "num_hidden_layers": _LAYERS,
}


def _scores(forward: Callable[..., Any], **inputs: Any) -> Tensor:
    """Returns the scores that a forward of the library gives among other things."""
    return forward(**inputs).logits


class Bert(transformers.BertForMaskedLM):
    """An encoder that says for every place which token stood there."""

    def forward(self, tokens: Int[Tensor, "batch place"]) -> Float[Tensor, "batch place token"]:
        """Returns scores of all tokens at every place."""
        return _scores(super().forward, input_ids=tokens)


class Gpt2(transformers.GPT2LMHeadModel):
    """A decoder with learned positions and a tied head."""

    def forward(self, tokens: Int[Tensor, "batch place"]) -> Float[Tensor, "batch place token"]:
        """Returns scores of the next token at every place."""
        return _scores(super().forward, input_ids=tokens, use_cache=False)


class Llama(transformers.LlamaForCausalLM):
    """A decoder with rotary positions, grouped queries and gated inner layers."""

    def forward(self, tokens: Int[Tensor, "batch place"]) -> Float[Tensor, "batch place token"]:
        """Returns scores of the next token at every place."""
        return _scores(super().forward, input_ids=tokens, use_cache=False)


class T5(transformers.T5ForConditionalGeneration):
    """An encoder of tokens, and a decoder that reads it."""

    def forward(
        self, tokens: Int[Tensor, "batch place"], written: Int[Tensor, "batch step"]
    ) -> Float[Tensor, "batch step token"]:
        """Returns scores of the next token at every step."""
        return _scores(super().forward, input_ids=tokens, decoder_input_ids=written, use_cache=False)


class Vit(transformers.ViTForImageClassification):
    """An encoder of the squares of an image."""

    def forward(self, images: Float[Tensor, "batch channel row column"]) -> Float[Tensor, "batch class"]:
        """Returns the class scores."""
        return _scores(super().forward, pixel_values=images)


class Whisper(transformers.WhisperForConditionalGeneration):
    """An encoder of a signal of several bands over time, and a decoder that writes down what it says."""

    def forward(
        self, signal: Float[Tensor, "batch band time"], written: Int[Tensor, "batch step"]
    ) -> Float[Tensor, "batch step token"]:
        """Returns scores of the next token at every step."""
        return _scores(super().forward, input_features=signal, decoder_input_ids=written, use_cache=False)


def bert(vocabulary: int = 66, length: int = 64) -> nn.Module:
    """Builds a network in the style of BERT; `vocabulary` counts the mark of a hidden token too."""
    return Bert(
        transformers.BertConfig(vocab_size=vocabulary, max_position_embeddings=length, pad_token_id=None, **_SIZES)
    )


def gpt2(
    vocabulary: int = 65, length: int = 64, width: int = _WIDTH, inner: int = _INNER, layers: int = _LAYERS
) -> nn.Module:
    """Builds a network in the style of GPT-2; `inner` counts the neurons between the two maps of a layer."""
    sizes: dict[str, Any] = {"n_embd": width, "n_inner": inner, "n_head": _HEADS, "n_layer": layers}
    return Gpt2(transformers.GPT2Config(vocab_size=vocabulary, n_positions=length, **sizes, **_SPECIAL))


def llama(vocabulary: int = 65, length: int = 64) -> nn.Module:
    """Builds a network in the style of Llama, two queries to a key."""
    sizes: dict[str, Any] = {**_SIZES, "num_key_value_heads": _HEADS // 2, "max_position_embeddings": length}
    return Llama(transformers.LlamaConfig(vocab_size=vocabulary, **sizes, **_SPECIAL))


def t5(vocabulary: int = 65) -> nn.Module:
    """Builds a network in the style of T5, with relative positions."""
    sizes: dict[str, Any] = {"d_model": _WIDTH, "d_kv": _WIDTH // _HEADS, "d_ff": _INNER, "num_heads": _HEADS}
    return T5(transformers.T5Config(vocab_size=vocabulary, num_layers=_LAYERS, **sizes, **_SPECIAL))


def vit(
    size: int = 8,
    square: int = 2,
    classes: int = 10,
    channels: int = 1,
    width: int = _WIDTH,
    inner: int = _INNER,
    layers: int = _LAYERS,
) -> nn.Module:
    """Builds a network in the style of ViT, which cuts images of `size` pixels into squares."""
    shape: dict[str, Any] = {"image_size": size, "patch_size": square, "num_channels": channels, "num_labels": classes}
    sizes = {**_SIZES, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    return Vit(transformers.ViTConfig(**shape, **sizes))


def whisper(vocabulary: int = 11, bands: int = 8, time: int = 32, length: int = 4) -> nn.Module:
    """Builds a network in the style of Whisper; the signal is halved in time, and `length` tokens are written."""
    sizes: dict[str, Any] = {"d_model": _WIDTH, "num_mel_bins": bands}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": _LAYERS, f"{part}_attention_heads": _HEADS, f"{part}_ffn_dim": _INNER}
    places = {"max_source_positions": time // 2, "max_target_positions": length}
    start: dict[str, Any] = {"decoder_start_token_id": vocabulary - 1}
    return Whisper(transformers.WhisperConfig(vocab_size=vocabulary, **sizes, **places, **_SPECIAL, **start))
