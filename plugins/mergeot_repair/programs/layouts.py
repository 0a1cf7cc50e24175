"""What stands on an axis of a weight: groups of neurons, one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergekit_ot import AxisLayout, Blocks, Factors, Fixed, ModelGraph, Neurons


def stretches(graph: ModelGraph, weight: str, axis: int) -> list[tuple[str, int]] | None:
    """Returns (group, numbers per neuron) along an axis; None where something else stands there.

    A layout is a group, a group times fixed places behind it, or several of these one after the other.
    """
    return _stretches(graph.layouts[weight][axis])


def _stretches(layout: AxisLayout) -> list[tuple[str, int]] | None:
    if isinstance(layout, Neurons):
        return [(layout.group, 1)]
    if isinstance(layout, Factors):
        return _with_taps(layout.parts)
    if not isinstance(layout, Blocks):
        return None
    stretches_of_blocks: list[tuple[str, int]] = []
    for part in layout.parts:
        of_part = _stretches(part)
        if of_part is None:
            return None
        stretches_of_blocks += of_part
    return stretches_of_blocks


def _with_taps(factors: Sequence[AxisLayout]) -> list[tuple[str, int]] | None:
    """Returns a group with the number of fixed places behind each of its neurons."""
    first, *rest = factors
    places = [factor.size for factor in rest if isinstance(factor, Fixed)]
    if not isinstance(first, Neurons) or len(places) < len(rest):
        return None
    return [(first.group, math.prod(places))]
