"""A chain in words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from mergeot_chains.layers import CONVOLUTION, EMBEDDING, LINEAR, Layer
from mergeot_chains.network import Flattening

_ACTIVATIONS = {"relu": "ReLU", "none": "nothing"}


def sentence_of(
    weighted: Sequence[Layer], joints: Sequence[Flattening | None], norms: Sequence[Layer], activation: object
) -> str:
    """Returns what a chain is: its layers in order with their widths, and what was put between them.

    Example:
        >>> layers = [Layer("fc1", LINEAR, 4, 8), Layer("fc2", LINEAR, 8, 2)]
        >>> sentence_of(layers, [None], [], "relu")
        'a chain of 2 linear layers 4-8-2, ReLU between them'
    """
    runs = [(kind, list(run)) for kind, run in itertools.groupby(weighted, key=lambda layer: layer.kind)]
    parts = [_run(kind, layers) for kind, layers in runs]
    said = f"a chain of {', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else f"a chain of {parts[0]}"
    if any(layer.kind in (LINEAR, CONVOLUTION) for layer in weighted[:-1]):
        shown = "none" if activation is None else str(activation)
        said += f", {_ACTIVATIONS.get(shown, shown)} between them"
    if norms:
        said += f", with {len(norms)} BatchNorm{'s' * (len(norms) > 1)}"
    for joint in joints:
        if joint is not None and math.prod(joint.places) > 1:
            said += f", flattened channel by channel ({'×'.join(str(size) for size in joint.places)} places each)"
    return said


def _run(kind: str, layers: Sequence[Layer]) -> str:
    widths = "-".join(map(str, (layers[0].inputs, *(layer.outputs for layer in layers))))
    if layers[0].is_recurrent:
        depth = sum(layer.depth for layer in layers)
        ways = " in both directions" if any(layer.is_both_ways for layer in layers) else ""
        return f"{depth} layer{'s' * (depth > 1)} of {kind} {widths}{ways} (batch first)"
    if kind == EMBEDDING:
        return f"an embedding {widths}"
    return f"{len(layers)} {kind}s {widths}" if len(layers) > 1 else f"a {kind} {widths}"
