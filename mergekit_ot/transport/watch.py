"""Sees whether a solver writes to the measures that it is lent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_ot.transport.measure import NeuronMeasure
from mergekit_ot.transport.support import weighed


class MeasureWatch:
    """Sees when a solver writes to measures that it is given; what nobody asked for cannot be written to.

    Args:
        measures: What is lent.

    Example:
        >>> measure = NeuronMeasure.uniform(torch.ones(2, 1))
        >>> watch = MeasureWatch([measure])
        >>> measure.support[0] = 7
        >>> watch.changed()
        [0]
    """

    def __init__(self, measures: Sequence[NeuronMeasure]) -> None:
        self.measures = measures
        self.before = [[weighed(tensor) for tensor in _given(measure)] for measure in measures]

    def changed(self) -> list[int]:
        """Returns the numbers of the sources whose measures are no longer what they were."""
        found = []
        for place, (old, measure) in enumerate(zip(self.before, self.measures, strict=True)):
            support = measure.joined
            made = [] if measure.support_print is None or support is None else [(measure.support_print, support)]
            pairs = [*zip(old, _given(measure), strict=True), *made]
            if not all(torch.equal(before, weighed(tensor)) for before, tensor in pairs):
                found.append(place)
        return found


def _given(measure: NeuronMeasure) -> list[Tensor]:
    """Returns what a measure holds, without a support that is joined when it is asked for."""
    support = measure.support if measure.deferred is None else None
    return [each for each in (support, measure.mass, measure.structure) if each is not None and each.numel()]
