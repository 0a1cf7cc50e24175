"""What mergekit does itself, and how the two go together."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

# They merge what is in one order of neurons already.
OWN_METHODS = frozenset(
    (
        "linear",
        "slerp",
        "nuslerp",
        "multislerp",
        "karcher",
        "task_arithmetic",
        "ties",
        "dare_ties",
        "dare_linear",
        "breadcrumbs",
        "breadcrumbs_ties",
        "model_stock",
        "nearswap",
        "della",
        "della_linear",
        "sce",
        "arcee_fusion",
        "passthrough",
        "ram",
        "ramplus_tl",
        "core_space",
    )
)
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_MOST_NAMES = 8
_CONFIGURATION_BYTES = 1 << 20


def own_method_hint(method: str, models: Sequence[str], base: str | None) -> str:
    """Returns how models are merged by a method of mergekit, and how they are fused here.

    Example:
        >>> own_method_hint("ties", ["a", "b"], "base").partition("mergekit-yaml: ")[2].partition(". ")[0]
        'mergeot align base a b -o aligned'
    """
    order = list(models) if base is None else [base, *(name for name in models if name != base)]
    shown = shlex.join(order[:_MOST_NAMES]) + (" …" if len(order) > _MOST_NAMES else "")
    average = " merge_method: average is the same mean, as the models stand." if method == "linear" else ""
    what = "a method of mergekit, which stacks slices of layers" if method == "passthrough" else "a method of mergekit"
    return (
        f"'{method}' is {what}. Put the models into one order of neurons first, and name what is written in this "
        f"recipe, for mergekit-yaml: mergeot align {shown} -o aligned. Or fuse them here: merge_method: wb ('mergeot "
        f"plugins' lists the solvers).{average}"
    )


def layer_count(folder: Path) -> int | None:
    """Returns how many layers the configuration beside a model's weights says; None where there is none."""
    file = folder / "config.json"
    try:
        if not file.is_file() or file.stat().st_size > _CONFIGURATION_BYTES:
            return None
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    counts = [said[key] for key in _LAYER_COUNTS if type(said.get(key)) is int] if isinstance(said, dict) else []
    return counts[0] if counts else None
