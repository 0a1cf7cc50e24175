"""A solver and a measure that hand everything on to others."""

from __future__ import annotations

from dataclasses import dataclass

from mergeot_wasserstein.solver import WassersteinBarycenterSolver

from mergekit_ot import (
    AbstractBarycenterSolver,
    AbstractNodeMeasure,
    BarycenterProblem,
    GroupView,
    NeuronMeasure,
    Solution,
)


class LoopbackMeasure(AbstractNodeMeasure):
    """A neuron is its weights."""

    def measure(self, view: GroupView) -> tuple[NeuronMeasure, ...]:
        """Returns one measure per source."""
        return tuple(NeuronMeasure.uniform(view.weights(i), view.structure(i)) for i in range(view.count))


@dataclass(frozen=True)
class LoopbackSolver(AbstractBarycenterSolver):
    """The Wasserstein barycenter under another name."""

    name = "loopback"
    summary = "hands on to 'wb'"
    measure = "loopback-weights"

    def find(self, problem: BarycenterProblem) -> Solution:
        """Returns what the Wasserstein barycenter finds."""
        return WassersteinBarycenterSolver().find(problem)
