"""Test architectures by set; what is known of their freedom stands in `by_hand` and in the golden file."""

from __future__ import annotations

import importlib

from architectures.base import Sample

# Set → module and name of its dictionary. The last two were written down when the rules were frozen.
SETS = {
    "convolutional": ("architectures.convolutional", "CONVOLUTIONAL"),
    "recurrent": ("architectures.recurrent", "RECURRENT"),
    "attention": ("architectures.attention", "ATTENTION"),
    "mixed": ("architectures.mixed", "MIXED"),
    "transformers_language": ("architectures.transformers_language", "LANGUAGE"),
    "transformers_vision": ("architectures.transformers_vision", "VISION"),
    "held_out_language": ("architectures.held_out_language", "HELD_OUT_LANGUAGE"),
    "held_out_other": ("architectures.held_out_other", "HELD_OUT_OTHER"),
}
PLAIN = ("convolutional", "recurrent", "attention", "mixed")
LIBRARY = ("transformers_language", "transformers_vision")
HELD_OUT = ("held_out_language", "held_out_other")


def samples(which: str) -> dict[str, Sample]:
    """Returns the architectures of one set by name."""
    module, name = SETS[which]
    return getattr(importlib.import_module(module), name)


def names(*sets: str) -> list[tuple[str, str]]:
    """Returns (set, name) of every architecture in the sets."""
    return [(which, name) for which in sets for name in samples(which)]
