"""A solver and a measure that hand everything on to others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mergeot_wasserstein.solver import WassersteinBarycenterSolver

from mergekit_ot import (
    AbstractBarycenterSolver,
    AbstractNodeMeasure,
    Barycenter,
    BarycenterProblem,
    GroupView,
    NeuronMeasure,
)


class LoopbackMeasure(AbstractNodeMeasure):
    """A neuron is its weights."""

    def measure(self, view: GroupView) -> tuple[NeuronMeasure, ...]:
        """Returns one measure per source."""
        return tuple(NeuronMeasure.uniform(view.weights(i), view.structure(i)) for i in range(view.count))


@dataclass(frozen=True)
class LoopbackSolver(AbstractBarycenterSolver):
    """The Wasserstein barycenter under another name."""

    name: ClassVar[str] = "loopback"
    summary: ClassVar[str] = "hands on to 'wb'"
    measure: ClassVar[str] = "loopback-weights"

    def solve(self, problem: BarycenterProblem) -> Barycenter:
        """Returns what the Wasserstein barycenter is."""
        return WassersteinBarycenterSolver().solve(problem)
