"""The barycenter problem, its result, and the class every solver derives from."""

from __future__ import annotations

import abc
import enum
from typing import ClassVar

from mergekit_ot.transport.problem import Barycenter, BarycenterProblem


class Scope(enum.Enum):
    """Which tensors describe a neuron: only those behind it, or every tensor that touches it."""

    INCOMING = "incoming"
    INCIDENT = "incident"


class Start(enum.Enum):
    """What counts as aligned before the first step: nothing, or every group at the identity."""

    NOTHING = "nothing aligned"
    IDENTITY = "identity"


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
