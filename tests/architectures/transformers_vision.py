"""Vision and audio models of transformers: the ones that the development is allowed to look at."""

from __future__ import annotations

from typing import Any

from architectures.base import Sample, images, numbers
from architectures.wrapped import Output, build


def _classifier(family: str, size: int, **settings: Any) -> Sample:
    """Returns a classifier of square images."""

    def make() -> Output:
        model = build(f"{family}ForImageClassification", f"{family}Config", num_labels=5, **settings)
        return Output(model, "logits", ("pixel_values",))

    return Sample(make, images(3, size))


def _segformer() -> Output:
    settings: dict[str, Any] = {
        "num_encoder_blocks": 3,
        "depths": (1, 2, 1),
        "sr_ratios": (4, 2, 1),
        "hidden_sizes": (6, 12, 20),
        "patch_sizes": (7, 3, 3),
        "strides": (4, 2, 2),
        "num_attention_heads": (1, 2, 4),
        "mlp_ratios": (3, 3, 2),
        "decoder_hidden_size": 14,
    }
    model = build("SegformerForSemanticSegmentation", "SegformerConfig", num_labels=5, **settings)
    return Output(model, "logits", ("pixel_values",))


def _whisper_encoder() -> Output:
    settings: dict[str, Any] = {
        "vocab_size": 37,
        "num_mel_bins": 10,
        "d_model": 24,
        "encoder_layers": 2,
        "encoder_attention_heads": 3,
        "encoder_ffn_dim": 40,
        "decoder_layers": 1,
        "decoder_attention_heads": 3,
        "decoder_ffn_dim": 40,
        "max_source_positions": 7,
        "max_target_positions": 7,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "decoder_start_token_id": 1,
        "begin_suppress_tokens": None,
    }
    model = build("WhisperModel", "WhisperConfig", **settings)
    return Output(model.encoder, "last_hidden_state", ("input_features",))


VISION: dict[str, Sample] = {
    "vit": _classifier(
        "ViT",
        16,
        image_size=16,
        patch_size=4,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
    ),
    "swin": _classifier(
        "Swin",
        16,
        image_size=16,
        patch_size=2,
        embed_dim=12,
        depths=(2, 2),
        num_heads=(3, 6),
        window_size=4,
        mlp_ratio=3.0,
    ),
    "segformer": Sample(_segformer, images(3, 32)),
    "whisper_encoder": Sample(_whisper_encoder, numbers(2, 10, 14)),
    "hf_resnet": _classifier("ResNet", 32, embedding_size=12, hidden_sizes=[20, 36], depths=(2, 2)),
    "convnext": _classifier(
        "ConvNext",
        32,
        image_size=32,
        patch_size=4,
        num_stages=3,
        hidden_sizes=(8, 12, 20),
        depths=(1, 2, 1),
        layer_scale_init_value=0.5,
    ),
    "mobilenet_v2": _classifier(
        "MobileNetV2",
        64,
        image_size=64,
        depth_multiplier=0.2,
        depth_divisible_by=2,
        min_depth=4,
        finegrained_output=False,
        expand_ratio=3.0,
        initializer_range=0.3,
    ),
}
