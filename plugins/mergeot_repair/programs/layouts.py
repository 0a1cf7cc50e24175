"""What stands on an axis of a weight: groups of neurons, one after the other."""

from __future__ import annotations

from mergekit_ot import ModelGraph


def stretches(graph: ModelGraph, weight: str, axis: int) -> list[tuple[str, int]] | None:
    """Returns (group, numbers per neuron) along an axis; None where something else stands there.

    A layout is a group, a group times fixed places behind it, or several of these one after the other.
    """
    return _stretches(graph.layouts[weight][axis])


def _stretches(layout: object) -> list[tuple[str, int]] | None:
    group, parts = getattr(layout, "group", None), getattr(layout, "parts", None)
    if group is not None:
        return [(group, 1)]
    if parts is None:
        return None
    if hasattr(layout, "number"):
        found = [_stretches(part) for part in parts]
        return None if any(one is None for one in found) else [pair for one in found for pair in one or ()]
    first, rest = parts[0], parts[1:]
    if getattr(first, "group", None) is None or any(
        _stretches(part) is not None or not hasattr(part, "size") for part in rest
    ):
        return None
    taps = 1
    for part in rest:
        taps *= part.size
    return [(first.group, taps)]
