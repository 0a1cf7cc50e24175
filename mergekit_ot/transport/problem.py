"""The barycenter problem, what a solver finds, and the barycenter that follows."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit_ot.errors import SolverError
from mergekit_ot.transport.coupling import Coupling
from mergekit_ot.transport.measure import NeuronMeasure


class Status(enum.Enum):
    """How a solver ended; each value is a sentence of advice.

    Example:
        >>> Status.MAX_STEPS.value
        'Stopped at the step limit: raise max_steps, or accept the couplings as they are.'
    """

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
        group: Name of the group, for messages.

    Example:
        >>> import torch
        >>> measures = tuple(NeuronMeasure.uniform(torch.zeros(size, 1)) for size in (2, 3, 3))
        >>> problem = BarycenterProblem(measures, (0.5, 0.0, 0.5), size=3)
        >>> problem.is_assignment, problem.counting, problem.fitting
        (False, (0, 2), (1, 2))
    """

    measures: tuple[NeuronMeasure, ...]
    model_weights: tuple[float, ...]
    size: int
    initial: tuple[Coupling, ...] | None = None
    seed: int = 0
    group: str = ""

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

    @property
    def counting(self) -> tuple[int, ...]:
        """Numbers of the sources with a positive model weight: the only ones that the objective looks at."""
        return tuple(place for place, weight in enumerate(self.model_weights) if weight > 0)

    @property
    def fitting(self) -> tuple[int, ...]:
        """Numbers of the sources with as many neurons as the fused group."""
        return tuple(place for place, measure in enumerate(self.measures) if measure.size == self.size)

    def first_fitting(self, reason: str) -> int:
        """Returns the number of the first source with as many neurons as the fused group.

        Args:
            reason: Why there has to be one, and what to do about it, for the message.

        Raises:
            SolverError: There is none.
        """
        if not self.fitting:
            sizes = [measure.size for measure in self.measures]
            raise SolverError(f"The fused group has {self.size} neurons and the sources have {sizes}: {reason}")
        return self.fitting[0]


@dataclass(frozen=True)
class Solution:
    """What a solver's `find` returns where couplings alone do not say it all.

    Attributes:
        couplings: One per source, those of zero model weight included.
        status: How the search ended.
        stats: Numbers worth showing: steps, starts, trace of the objective …
        objective: What the solver minimises, as a function of couplings; None for the cost of the barycenter with a
            free support, `barycenter_cost`.
        reference: Number of the source in whose order the fused neurons are put; None for the first that counts.

    Example:
        >>> from mergekit_ot import Permutation
        >>> Solution((Permutation.identity(2),) * 2, Status.MAX_STEPS, {"steps": 100}).status.name
        'MAX_STEPS'
    """

    couplings: tuple[Coupling, ...]
    status: Status = Status.CONVERGED
    stats: Mapping[str, Any] = field(default_factory=dict)
    objective: Callable[[Sequence[Coupling]], float] | None = None
    reference: int | None = None


@dataclass(frozen=True)
class Barycenter:
    """The solution of a `BarycenterProblem`.

    Attributes:
        measure: The fused group's measure: support ``[size, d]``, mass ``[size]``, structure ``[s, size, size]``.
        couplings: One per source.
        cost: The objective ``Σ_i λ_i ⟨Π_i, C_i⟩`` at the end.
        status: How the solver ended.
        stats: Numbers worth showing: steps, starts, trace of the objective …

    Example:
        >>> import torch
        >>> from mergekit_ot import Permutation
        >>> Barycenter(NeuronMeasure.uniform(torch.zeros(2, 1)), (Permutation.identity(2),), 0.0, Status.CONVERGED).cost
        0.0
    """

    measure: NeuronMeasure
    couplings: tuple[Coupling, ...]
    cost: float
    status: Status
    stats: Mapping[str, Any] = field(default_factory=dict)
