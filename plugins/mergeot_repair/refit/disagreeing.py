"""Whether the sources of a fusion saw different things, judged by what they predict."""

from __future__ import annotations

from collections.abc import Iterable

from mergekit_ot import Disagreement, RepairContext, probabilities_of
from mergeot_repair.programs.maps import LinearMap
from mergeot_repair.programs.running import HeldBytes, StagedRun

# So many inputs tell by what the sources differ; fewer do where they have nearly the same answers, or clearly differ in
# no direction of their own, of which chance makes more in few inputs than in many.
_INPUTS, _FEW_INPUTS = 2_000, 500
_NEARLY_NONE, _CLEARLY_LESS = 0.015, 0.25


def saw_different_things(context: RepairContext, results: Iterable[LinearMap]) -> bool:
    """Returns whether the sources that have a weight are sure of different classes (`mergekit_ot.Disagreement`).

    Args:
        context: Of the repair.
        results: The maps that make the classes of the network.
    """
    used = [source for source, weight in zip(context.sources, context.model_weights, strict=True) if weight > 0]
    for linear_map in results if len(used) > 1 else ():
        found, count = Disagreement(len(used)), 0
        for inputs in context.batches:
            runs = (StagedRun(source.program, source.state, inputs, HeldBytes(0)) for source in used)
            made = [run.values_of([linear_map.output])[linear_map.output] for run in runs]
            found.add([probabilities_of(logits, linear_map.values_axis) for logits in made])
            count += len(inputs[0])
            is_clear = found.share < _NEARLY_NONE or found.systematic * found.certainty < _CLEARLY_LESS
            if count >= (_FEW_INPUTS if is_clear else _INPUTS):
                break
        if found.saw_different_things:
            return True
    return False
