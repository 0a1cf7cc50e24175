"""Vision and audio models that the development does not look at."""

from __future__ import annotations

from typing import Any

from architectures.base import Sample, images, numbers, tokens
from architectures.wrapped import Output, build

_VIT: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
}


def _classifier(family: str, size: int, **settings: Any) -> Sample:
    """Returns a classifier of square images."""

    def make() -> Output:
        model = build(f"{family}ForImageClassification", f"{family}Config", num_labels=5, **settings)
        return Output(model, "logits", ("pixel_values",))

    return Sample(make, images(3, size))


def _wav2vec2() -> Output:
    settings: dict[str, Any] = {
        "vocab_size": 37,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "conv_dim": (10, 14),
        "conv_stride": (3, 2),
        "conv_kernel": (5, 3),
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 4,
        "apply_spec_augment": False,
        "layerdrop": 0.0,
    }
    return Output(build("Wav2Vec2ForCTC", "Wav2Vec2Config", **settings), "logits", ("input_values",))


def _ast() -> Output:
    settings: dict[str, Any] = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "patch_size": 4,
        "frequency_stride": 3,
        "time_stride": 3,
        "max_length": 19,
        "num_mel_bins": 10,
    }
    model = build("ASTForAudioClassification", "ASTConfig", num_labels=5, **settings)
    return Output(model, "logits", ("input_values",))


def _perceiver() -> Output:
    settings: dict[str, Any] = {
        "vocab_size": 37,
        "max_position_embeddings": 16,
        "num_latents": 6,
        "d_latents": 24,
        "d_model": 20,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 3,
        "num_cross_attention_heads": 2,
    }
    model = build("PerceiverForSequenceClassification", "PerceiverConfig", num_labels=5, **settings)
    return Output(model, "logits", ("inputs",))


HELD_OUT_OTHER: dict[str, Sample] = {
    "deit": _classifier("DeiT", 16, **_VIT),
    "beit": _classifier("Beit", 16, **_VIT, use_relative_position_bias=True, layer_scale_init_value=0.5),
    "dinov2": _classifier(
        "Dinov2",
        16,
        image_size=16,
        patch_size=4,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        mlp_ratio=2,
        layerscale_value=0.5,
    ),
    "pvt": _classifier(
        "Pvt",
        32,
        image_size=32,
        num_encoder_blocks=2,
        depths=(2, 2),
        sequence_reduction_ratios=(2, 1),
        hidden_sizes=(8, 20),
        patch_sizes=(4, 2),
        strides=(4, 2),
        num_attention_heads=(1, 2),
        mlp_ratios=(3, 2),
    ),
    "poolformer": _classifier(
        "PoolFormer",
        32,
        num_encoder_blocks=3,
        depths=(1, 2, 1),
        hidden_sizes=(8, 12, 20),
        patch_sizes=(7, 3, 3),
        strides=(4, 2, 2),
        padding=(2, 1, 1),
        mlp_ratio=3.0,
        layer_scale_init_value=0.5,
    ),
    "regnet": _classifier(
        "RegNet", 32, embedding_size=10, hidden_sizes=(12, 20), depths=(1, 2), groups_width=4, layer_type="y"
    ),
    "mobilevit": _classifier(
        "MobileViT",
        128,
        image_size=128,
        hidden_sizes=(12, 16, 20),
        neck_hidden_sizes=(4, 6, 8, 10, 14, 18, 28),
        num_attention_heads=2,
        expand_ratio=3.0,
        initializer_range=0.4,
    ),
    "focalnet": _classifier(
        "FocalNet",
        16,
        image_size=16,
        patch_size=2,
        embed_dim=12,
        hidden_sizes=(24, 24),
        depths=(2, 1),
        focal_levels=(2, 2),
        focal_windows=(3, 3),
        mlp_ratio=3.0,
    ),
    "levit": _classifier(
        "Levit",
        128,
        image_size=128,
        hidden_sizes=(16, 20, 28),
        num_attention_heads=(2, 3, 4),
        depths=(1, 1, 1),
        key_dim=(4, 4, 4),
    ),
    "convnextv2": _classifier(
        "ConvNextV2", 32, image_size=32, num_stages=3, hidden_sizes=(8, 12, 20), depths=(1, 2, 1)
    ),
    "swinv2": _classifier(
        "Swinv2",
        16,
        image_size=16,
        patch_size=2,
        embed_dim=12,
        depths=(2, 2),
        num_heads=(3, 6),
        window_size=4,
        pretrained_window_sizes=(0, 0),
        mlp_ratio=3.0,
    ),
    "wav2vec2": Sample(_wav2vec2, numbers(2, 61)),
    "ast": Sample(_ast, numbers(2, 19, 10)),
    "perceiver": Sample(_perceiver, tokens(37)),
}
