"""What a ``config.json`` says, as far as it is followed: sizes and kinds, and nothing that fetches or runs anything."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from mergekit_ot.errors import CheckpointError

# Where kernels, code or other weights come from, how outputs are packed, who wrote it: not for a file to say.
_NOT_FOLLOWED = frozenset(
    {
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "_attn_implementation_autoset",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
        "auto_map",
        "use_kernels",
        "kernel_config",
        "use_pretrained_backbone",
        "_name_or_path",
        "name_or_path",
        "dtype",
        "torch_dtype",
        "return_dict",
        "use_return_dict",
        "output_hidden_states",
        "output_attentions",
        "torchscript",
        "transformers_version",
    }
)
# Sizes that make modules or tables in Python, one by one.
_COUNTED = ("layer", "depth", "block", "expert", "label")
_MOST_COUNTED = 10_000


class UnknownNetworkError(Exception):
    """A configuration names no class that can be built without code of the folder."""


def known_network(content: Mapping[str, Any], tensors: int) -> tuple[type[PreTrainedModel], dict[str, Any]]:
    """Returns the class that a configuration names and the values that its network is built from.

    Args:
        content: What stands in ``config.json``.
        tensors: How many tensors the weights have.

    Raises:
        UnknownNetworkError: It names none; the message says why, without a full stop.
        CheckpointError: The weights are quantised, or it asks for more than the weights can fill.
    """
    quantised = content.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
        raise CheckpointError(
            f"The weights are quantised ({str(method)[:40]}): packed integers cannot be averaged. Use the folder with "
            "bfloat16, float16 or float32 weights, or dequantise it with the tool that made it."
        )
    _check_counts(content, tensors)
    names = content.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise UnknownNetworkError("its config.json names no class ('architectures')")
    kind = _class_of(names[0])
    if kind is None:
        if content.get("auto_map"):
            raise UnknownNetworkError(
                f"its class '{names[0][:80]}' is code of the folder itself ('auto_map'), which is not run"
            )
        raise UnknownNetworkError(
            f"its class '{names[0][:80]}' is none of transformers {transformers.__version__}; a newer one may have it"
        )
    return kind, _followed(content)


def built_configuration(kind: type[PreTrainedModel], values: Mapping[str, Any]) -> PreTrainedConfig:
    """Returns the library's configuration object.

    Raises:
        UnknownNetworkError: The values are not those of the class.
    """
    try:
        known = transformers.CONFIG_MAPPING[values["model_type"]] if "model_type" in values else kind.config_class
        if known is None or kind.config_class is None:
            raise KeyError("model_type")
        chosen = known if issubclass(known, kind.config_class) else kind.config_class
        return chosen.from_dict(copy.deepcopy(dict(values)))
    except Exception as failure:
        said = next(iter(str(failure).splitlines()), "")[:200]
        raise UnknownNetworkError(
            f"its config.json is none of {kind.__name__} ({type(failure).__name__}: {said})"
        ) from failure


def values_under(content: object, key: str) -> Iterator[Any]:
    """Yields the values that stand under a key, the outermost first."""
    if not isinstance(content, Mapping):
        return
    if content.get(key) is not None:
        yield content[key]
    for inner in content.values():
        yield from values_under(inner, key)


def _class_of(name: str) -> type[PreTrainedModel] | None:
    if not name.isidentifier() or name.startswith("_"):
        return None
    try:
        found = getattr(transformers, name)
    except (AttributeError, ImportError):
        return None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def _followed(content: Any) -> Any:
    """Returns the values that are followed, with caches off."""
    if isinstance(content, dict):
        kept = {key: _followed(value) for key, value in content.items() if key not in _NOT_FOLLOWED}
        return {key: False if key == "use_cache" else value for key, value in kept.items()}
    return [_followed(value) for value in content] if isinstance(content, list) else content


def _check_counts(content: Any, tensors: int) -> None:
    most = max(_MOST_COUNTED, tensors)
    for key, value in _numbers(content):
        if value > most and any(word in key for word in _COUNTED):
            raise CheckpointError(
                f"config.json asks for {key} = {value if value < 10**18 else 'a huge number'}, and the weights have "
                f"{tensors} tensors. Copy or download the folder again."
            )


def _numbers(content: Any) -> Iterator[tuple[str, int]]:
    for key, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, int) and not isinstance(value, bool):
            yield str(key)[:80], value
        else:
            yield from _numbers(value)
