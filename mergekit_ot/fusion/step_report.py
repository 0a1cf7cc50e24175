"""What observers are told after a step, and how the fusion of a group ended."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_ot.transport.problem import Status


@dataclass(frozen=True)
class GroupReport:
    """How the fusion of one group ended."""

    name: str
    size: int
    cost: float | None
    status: Status


@dataclass(frozen=True)
class StepReport:
    """What observers are told after a step: its place, the sweep, and the groups it solved."""

    number: int
    total: int
    sweep: int
    groups: tuple[GroupReport, ...]
