"""Measures that a search for a barycenter starts from, and the pairs of sources that it has coupled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from mergekit_ot import BarycenterProblem, Coupling, NeuronMeasure, Permutation


@dataclass
class FoundPairs:
    """The couplings of a start with each source, of which each pair of sources needs one.

    Attributes:
        couplings: By the number of the source that the start equals, and that of the other source.
        is_clear: Whether each coupling so far was clearly the best.
    """

    couplings: dict[tuple[int | None, int], Coupling] = field(default_factory=dict)
    is_clear: bool = True

    def add(self, anchor: int | None, place: int, coupling: Coupling, is_clear: bool) -> None:
        """Keeps the coupling of a start with a source."""
        self.couplings[anchor, place] = coupling
        self.is_clear = self.is_clear and is_clear

    def inverse(self, anchor: int | None, place: int) -> Coupling | None:
        """Returns the coupling of a start with a source, where it is known from the other way about."""
        if anchor is None:
            return None
        known = self.couplings.get((place, anchor))
        if known is None or not known.is_permutation:
            return None
        size = known.target_size
        (inverse,) = known.in_source_order((Permutation.identity(size, known.partners().device),))
        return inverse


def starting_measures(problem: BarycenterProblem) -> Iterator[tuple[NeuronMeasure, int | None]]:
    """Yields targets to start from, each with the source that it equals (None where it was resampled)."""
    fitting = [place for place in problem.counting if place in problem.fitting]
    if fitting:
        if problem.is_assignment and len(problem.counting) <= 2:
            # Which of two starts makes no difference to the problem, only to the search: choose by content, so that
            # the result does not depend on the order in which the sources are given.
            fitting = [max(fitting, key=lambda place: float(problem.measures[place].support.square().sum()))]
        for place in fitting:
            measure = problem.measures[place]
            yield (
                NeuronMeasure.uniform(measure.support, measure.structure, measure.signs),
                place if measure.is_uniform else None,
            )
        return
    for place in sorted(problem.counting, key=lambda place: abs(problem.measures[place].size - problem.size)):
        yield _resampled(problem.measures[place], problem.size), None


def _resampled(measure: NeuronMeasure, size: int) -> NeuronMeasure:
    rows = torch.arange(size, device=measure.support.device) * measure.size // size
    structure = measure.structure
    if structure is not None:
        # Columns are read, so the sum over them is kept.
        structure = structure[:, rows][:, :, rows] * (measure.size / size)
    return NeuronMeasure.uniform(measure.support[rows], structure, measure.signs)
