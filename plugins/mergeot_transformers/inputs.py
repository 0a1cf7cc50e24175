"""Example inputs of a network, from its class and its configuration: token ids, pixels, audio, pairs of these."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mergeot_transformers.configuration import UnknownNetworkError, values_under

# Prime and small: no width of a network is mistaken for it, and a trace takes no longer than it must.
_TOKENS = 7
_TARGETS = 5
_SAMPLES = 2
_SIDE = 64
_WAVE = 4000
_MOST_NUMBERS = 1 << 24
_TOKEN_NAMES = ("input_ids", "decoder_input_ids")


def input_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Returns the keywords of the inputs that a network needs, the first first."""
    taken = inspect.signature(type(model).forward).parameters
    first = model.main_input_name
    parts = model.config.to_dict()
    # A network of two towers compares what both make of their inputs.
    if "text_config" in parts and {"input_ids", "pixel_values"} <= set(taken) and first != "decoder_input_ids":
        towers = ("vision_config" in parts) and not model.can_generate()
        return ("input_ids", "pixel_values") if towers else (first,)
    if model.config.is_encoder_decoder and "decoder_input_ids" in taken:
        return (first, "decoder_input_ids")
    if "decoder_input_ids" in taken and "decoder" in parts and "encoder" in parts:
        return (first, "decoder_input_ids")
    return (first,)


def example_inputs(model: PreTrainedModel, names: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Returns two samples of every input, the same ones for every network of one configuration.

    Raises:
        UnknownNetworkError: It is not known what an input looks like.
    """
    generator = torch.Generator().manual_seed(0)
    return tuple(_example(model, name, generator) for name in names)


def _example(model: PreTrainedModel, name: str, generator: torch.Generator) -> Tensor:
    values = model.config.to_dict()
    if name in _TOKEN_NAMES:
        return _tokens(values, name, generator)
    shape = _shape(values, name)
    if shape is None:
        raise UnknownNetworkError(f"it takes '{name}', of which its config.json does not say enough")
    if math.prod(shape) > _MOST_NUMBERS:
        raise UnknownNetworkError(f"one '{name}' of it would have more than {_MOST_NUMBERS} numbers")
    return torch.randn(_SAMPLES, *shape, generator=generator)


def _tokens(values: Mapping[str, Any], name: str, generator: torch.Generator) -> Tensor:
    vocabulary = next(values_under(values, "vocab_size"), None)
    if name == "decoder_input_ids" and isinstance(values.get("decoder"), Mapping):
        vocabulary = values["decoder"].get("vocab_size", vocabulary)
    if not isinstance(vocabulary, int) or vocabulary < 1:
        raise UnknownNetworkError("its config.json has no 'vocab_size'")
    keys = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "image_token_id")
    special = {each for key in keys for each in values_under(values, key) if isinstance(each, int)}
    # Of a huge vocabulary the first few thousand tokens show as much.
    plain = [token for token in range(min(vocabulary, 4096)) if token not in special] or [0]
    length = _TOKENS if name == "input_ids" else _TARGETS
    drawn = torch.randint(len(plain), (_SAMPLES, length), generator=generator)
    tokens = torch.tensor(plain)[drawn]
    # Some read what they know of a text where it ends.
    end = next((each for each in values_under(values, "eos_token_id") if isinstance(each, int)), None)
    if name == "input_ids" and end is not None and 0 <= end < vocabulary:
        tokens[:, -1] = end
    return tokens


def _shape(values: Mapping[str, Any], name: str) -> tuple[int, ...] | None:
    """Returns the shape of one input that is no token ids."""
    if name == "pixel_values":
        return _image(values)
    mels = next(values_under(values, "num_mel_bins"), None)
    if name == "input_features" and mels is not None:
        positions = next(values_under(values, "max_source_positions"), None)
        # Whisper's encoder halves the time of its input; others take any time, and it stands in front.
        is_whole = "decoder_layers" in values and "conv_kernel_sizes" not in values
        return (mels, 2 * positions) if is_whole and isinstance(positions, int) else (_SIDE, mels)
    if name == "input_values":
        length = next(values_under(values, "max_length"), None)
        return (length, mels) if mels is not None and isinstance(length, int) else (_WAVE,)
    return None


def _image(values: Mapping[str, Any]) -> tuple[int, ...]:
    vision = values.get("vision_config") or values.get("encoder") or values
    size = next(values_under(vision, "image_size"), _SIDE)
    channels = next(values_under(vision, "num_channels"), 3)
    sides = tuple(size.values()) if isinstance(size, Mapping) else size
    height, width = (sides[0], sides[-1]) if isinstance(sides, list | tuple) else (sides, sides)
    return (channels, height, width)
