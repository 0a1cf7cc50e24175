"""Branches that a trace did not record, tried before a fusion relies on the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.graph.capture.inputs import (
    SAMPLES_OF_A_PROOF,
    first_line,
    is_of_fixed_shapes,
    of_few_samples,
    traced_inputs,
)
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.symmetry.cases import REFUSED
from mergekit_ot.graph.symmetry.check import without_refuted
from mergekit_ot.graph.symmetry.symmetry import AbstractSymmetry
from mergekit_ot.storage.limits import CHECK_BYTES

# The weights, those that are compared with them, and what an instance holds, in double precision.
_BYTES_PER_WEIGHT = 3 * 8


def in_other_cases(
    source: SourceModel, graph: ModelGraph, inputs: tuple[object, ...], symmetries: Sequence[AbstractSymmetry]
) -> ModelGraph:
    """Returns the graph without the free groups that other cases refute: what `mergeot check` would pin as well.

    A network that is too large to be run in double precision, or cannot be, is left as it was traced; that its program
    was recorded for one case only is told anyway.

    Args:
        source: The network, whose code asks something.
        graph: As it was traced.
        inputs: At which it was traced.
        symmetries: What may be done to neurons.
    """
    asked = _BYTES_PER_WEIGHT * sum(shape.numel() for shape in source.architecture.shapes.values())
    if asked > CHECK_BYTES.value:
        said = f"The other cases were not tried: it would take {CHECK_BYTES.shown(asked)} ({CHECK_BYTES.variable})."
    else:
        make = source.architecture.built
        whole = traced_inputs(make(), inputs)
        few = whole if is_of_fixed_shapes(make()) else of_few_samples(whole, SAMPLES_OF_A_PROOF)
        try:
            return _tried(lambda chosen: without_refuted(make, graph, chosen, symmetries), few, whole)
        except REFUSED as error:
            said = (
                f"The other cases were not tried: with random weights the network does not run ({first_line(error)})."
            )
    told = graph.diagnostics
    return replace(graph, diagnostics=replace(told, remarks=(*told.remarks, said)))


def _tried(
    prove: Callable[[tuple[object, ...]], ModelGraph], few: tuple[object, ...], whole: tuple[object, ...]
) -> ModelGraph:
    """Returns what is proven at a few samples, or at all of them where the network runs at no others."""
    try:
        return prove(few)
    except REFUSED:
        if few is whole:
            raise
        return prove(whole)
