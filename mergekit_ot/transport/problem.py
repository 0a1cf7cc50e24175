"""The barycenter problem and its solution."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from mergekit_ot.transport.coupling import Coupling
from mergekit_ot.transport.measure import NeuronMeasure


class Status(enum.Enum):
    """How a solver ended; each value is a sentence of advice."""

    CONVERGED = "Converged: the couplings repeat, or the marginals and the objective are within tolerance."
    MAX_STEPS = "Stopped at the step limit: raise max_steps, or accept the couplings as they are."
    STALLED = "Stalled: a step no longer lowers the objective; try more starts or a larger epsilon."
    NONFINITE = "The ground cost is not finite: look for NaN or infinity in the sources' weights."


@dataclass(frozen=True)
class BarycenterProblem:
    """The fusion of one neuron group: N measures, their weights and the size of the barycenter.

    Attributes:
        measures: One per source; all supports have the same ``d``, all structures the same ``s``.
        model_weights: One per source, non-negative, summing to one. Zero is a weight.
        size: Number of neurons of the fused group; each has mass ``1 / size``.
        initial: Couplings in force before the solve, one per source; the result must not be worse than they are.
        seed: Seed of every random choice: same problem, same seed, same result.
    """

    measures: tuple[NeuronMeasure, ...]
    model_weights: tuple[float, ...]
    size: int
    initial: tuple[Coupling, ...] | None = None
    seed: int = 0

    @property
    def is_uniform(self) -> bool:
        """Whether every source gives each of its neurons the same mass."""
        return all(measure.is_uniform for measure in self.measures)

    @property
    def is_assignment(self) -> bool:
        """Whether every coupling can be a permutation: equal sizes and uniform masses."""
        return all(measure.size == self.size for measure in self.measures) and self.is_uniform

    @property
    def has_structure(self) -> bool:
        """Whether the group refers to itself."""
        return any(measure.structure is not None for measure in self.measures)


@dataclass(frozen=True)
class Barycenter:
    """The solution of a `BarycenterProblem`.

    Attributes:
        measure: The fused group's measure: support ``[size, d]``, mass ``[size]``, structure ``[s, size, size]``.
        couplings: One per source.
        cost: The objective ``Σ_i λ_i ⟨Π_i, C_i⟩`` at the end.
        status: How the solver ended.
        stats: Numbers worth showing: steps, starts, trace of the objective …
    """

    measure: NeuronMeasure
    couplings: tuple[Coupling, ...]
    cost: float
    status: Status
    stats: Mapping[str, object] = field(default_factory=dict)
