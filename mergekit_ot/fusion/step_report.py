"""What observers are told after a step, and how the fusion of a group ended."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_ot.transport.problem import Status


@dataclass(frozen=True)
class GroupReport:
    """How the fusion of one group ended.

    Attributes:
        name: Key of the group.
        size: Neurons of the fused group.
        cost: The objective at the end, where there is one.
        status: How the solver ended.
        solver: Who coupled it: the solver, the nested assignment of heads and channels, or nobody.
    """

    name: str
    size: int
    cost: float | None
    status: Status
    solver: str


@dataclass(frozen=True)
class StepReport:
    """What observers are told after a step: its place, the sweep, and the groups it solved."""

    number: int
    total: int
    sweep: int
    groups: tuple[GroupReport, ...]
