"""Which symmetries groups have besides the order of their neurons: proven, and told of every group."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.symmetry.planted import PlantedProof, find_proven
from mergekit_ot.graph.symmetry.rotary import with_rotary_groups
from mergekit_ot.graph.symmetry.symmetry import AbstractSymmetry


def held_symmetries(
    make: Callable[[], nn.Module],
    graph: ModelGraph,
    inputs: tuple[object, ...],
    symmetries: Sequence[AbstractSymmetry],
) -> dict[str, list[str]]:
    """Returns group → names of the symmetries that are proven at it, besides the order that the trace claims.

    Planes that positions turn are told of the pinned group of one half.

    Args:
        make: Gives a fresh instance each time; it must never have been run.
        graph: The graph of one of them.
        inputs: The inputs that it was traced at.
        symmetries: What may be done to neurons.
    """
    named, planted = with_rotary_groups(graph), PlantedProof(make, inputs, 0, graph)
    held: dict[str, list[str]] = {}
    for symmetry in symmetries:
        for key in {} if symmetry.is_traced else find_proven(symmetry, named, planted):
            held.setdefault(key if key in graph.groups else f"{key}.0", []).append(symmetry.name)
    return held
