"""The barycenter problem, its result, and the class every solver derives from."""

from __future__ import annotations

import abc
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from mergekit_ot.transport.measure import Coupling, NeuronMeasure


class Scope(enum.Enum):
    """Which tensors describe a neuron: only those behind it, or every tensor that touches it."""

    INCOMING = "incoming"
    INCIDENT = "incident"


class Start(enum.Enum):
    """What counts as aligned before the first step: nothing, or every group at the identity."""

    NOTHING = "nothing aligned"
    IDENTITY = "identity"


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


class AbstractBarycenterSolver(abc.ABC):
    """Base of all solvers. A subclass is a frozen dataclass whose fields are its options.

    The contract, checked by `mergekit_ot.testing.check_solver`: identical measures give identity couplings;
    permuting a source's rows permutes its plan; marginals are right; inputs stay untouched; dtype and device
    are kept; the same seed gives the same result; the cost never exceeds that of ``problem.initial``.

    Class attributes:
        name: The name on the command line.
        summary: One line for ``mergeot plugins``.
        scope: Which tensors describe a neuron.
        start: What counts as aligned before the first step.
        measure: Name of the node measure used where the user names none.
        wants_structure: Whether groups that do not refer to themselves get a structure too (distances
            between a neuron's weight vector and the others').
        uses_signs: Whether the solver negates neurons where a measure's `Signs` say that it may.
        is_order_random: Whether each sweep visits the groups in a new random order (seeded).
        max_sweeps: Sweeps over the groups at most; the engine stops earlier when no sweep gains. From the second
            sweep on, neurons are seen by every tensor that touches them.
        members: Which tensors that own a group's neurons describe them: ``all``, or only the ``first``.
        scaling: ``density`` (groups of different size compare as functions), or ``paper`` to compare and average the
            numbers themselves.
        structure_weight: Weight of the tensors in which a group refers to itself, in the objective of the whole.

    All of these may be fields of the subclass, and so options; ``name``, ``summary`` and ``measure`` may not.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    measure: ClassVar[str] = "weights"
    scope: Scope = Scope.INCOMING
    start: Start = Start.NOTHING
    wants_structure: bool = False
    uses_signs: bool = False
    is_order_random: bool = False
    max_sweeps: int = 1
    members: str = "all"
    scaling: str = "density"
    structure_weight: float = 1.0

    @abc.abstractmethod
    def solve(self, problem: BarycenterProblem) -> Barycenter:
        """Returns the barycenter of the problem's measures.

        Raises:
            SolverError: The solver cannot treat this kind of problem.
        """
