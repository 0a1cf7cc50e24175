"""Networks of the library, built from their configuration alone, whose forward takes inputs in order."""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from mergeot_transformers.configuration import built_configuration

# What a network computes, the first that its output has; what its encoder hands to its decoder is no output.
_RESULTS = (
    "logits",
    "logits_per_image",
    "start_logits",
    "prediction_logits",
    "pred_boxes",
    "reconstruction",
    "predicted_depth",
)
# Without any of those: these, as far as they are there.
_STATES = ("last_hidden_state", "pooler_output", "image_embeds", "text_embeds", "embeddings")
# Said at every call, where the network takes it.
_FIXED = {"use_cache": False, "return_dict": True}


class InOrder(nn.Module):
    """Makes a network of the library take its inputs in order and give tensors: a base in front of its class.

    Attributes:
        mergeot_inputs: The keywords under which the inputs are passed on.
        mergeot_fixed: Which of the fixed keywords it takes.
    """

    mergeot_inputs: tuple[str, ...]
    mergeot_fixed: tuple[str, ...]

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Returns the scores of the network where it has some, else its last states."""
        fixed = {name: _FIXED[name] for name in self.mergeot_fixed}
        named = dict(zip(self.mergeot_inputs, inputs, strict=True))
        output: Mapping[str, Any] = super().forward(**named, **fixed)
        for name in _RESULTS:
            if isinstance(output.get(name), Tensor):
                return output[name] if name != "start_logits" else (output[name], output["end_logits"])
        states = tuple(output[name] for name in _STATES if isinstance(output.get(name), Tensor))
        if not states:
            states = tuple(
                value for value in output.values() if isinstance(value, Tensor) and value.is_floating_point()
            )
        return states[0] if len(states) == 1 else states


@final
@dataclass(frozen=True)
class FolderNetwork:
    """Builds a network that a configuration describes; equal for equal configurations.

    Attributes:
        kind: Name of the class in `transformers`.
        values: The configuration as JSON.
        inputs: The keywords of forward's inputs, in order.
    """

    kind: str
    values: str
    inputs: tuple[str, ...]

    def __call__(self) -> nn.Module:
        """Returns a fresh instance in evaluation mode."""
        model: Any = build(self.kind, json.loads(self.values))
        taken = inspect.signature(type(model).forward).parameters
        model.__class__ = in_order(type(model))
        model.mergeot_inputs = self.inputs
        model.mergeot_fixed = tuple(name for name in _FIXED if name in taken)
        return model


def build(kind: str, values: Mapping[str, Any]) -> PreTrainedModel:
    """Returns a fresh instance of a class of the library, in float32 and evaluation mode.

    Raises:
        UnknownNetworkError: The values are not those of the class.
    """
    cls = getattr(transformers, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(built_configuration(cls, values)).eval()


def outline(kind: str, values: Mapping[str, Any]) -> PreTrainedModel:
    """Returns an instance on the meta device."""
    with torch.device("meta"):
        return build(kind, values)


def in_order(kind: type[nn.Module]) -> type[nn.Module]:
    """Returns the class with its inputs in order; it has the name of the library's, and is found by it here."""
    here = vars(sys.modules[__name__])
    found = here.get(kind.__name__)
    if found is None:
        found = type(kind.__name__, (InOrder, kind), {"__module__": __name__, "__qualname__": kind.__name__})
        here[kind.__name__] = found
    return found
