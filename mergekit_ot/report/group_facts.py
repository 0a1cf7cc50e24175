"""What a report says about the couplings of each neuron group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mergekit_ot.fusion.alignment import FamilyCoupling
from mergekit_ot.fusion.result import FusionResult
from mergekit_ot.fusion.step_report import GroupReport
from mergekit_ot.transport.coupling import Coupling


@dataclass(frozen=True)
class CouplingFacts:
    """How the neurons of a fused group correspond to those of one source; a family is counted as a whole.

    Attributes:
        size: Number of neurons in the source, in one member of a family.
        is_permutation: Whether neurons are only reordered.
        moved: Fused neurons whose (largest) partner is at another place; None where the sizes differ.
        negated: Fused neurons at which the source's arrives with its sign changed.
        alone: Fused neurons without a partner in the source: they were kept apart for the others.
        partners: Mean number of partners of a fused neuron that has any (the exponential of the entropy).
        is_rotation: Whether neurons are combined without a loss: by an invertible map.
    """

    size: int
    is_permutation: bool
    moved: int | None
    negated: int
    alone: int
    partners: float
    is_rotation: bool = False


@dataclass(frozen=True)
class GroupFacts:
    """A neuron group of the fused model.

    Attributes:
        report: Name, size, cost, status, and who coupled it.
        couplings: One per source; empty where the solver leaves every neuron in its place.
        facts: One per coupling.
        orders: Number of independent orders: one, or the members of a family.
        symmetries: Names of the symmetries that the fusion asked for and that hold here, besides the order of neurons.
    """

    report: GroupReport
    couplings: tuple[Coupling | FamilyCoupling, ...]
    facts: tuple[CouplingFacts, ...]
    orders: int
    symmetries: tuple[str, ...] = ()

    @property
    def is_permutation(self) -> bool:
        """Whether neurons of all sources are only reordered."""
        return all(fact.is_permutation for fact in self.facts)

    @property
    def is_rotation(self) -> bool:
        """Whether neurons of some source are rotated, and none are blended."""
        is_any = any(fact.is_rotation for fact in self.facts)
        return is_any and all(fact.is_rotation or fact.is_permutation for fact in self.facts)

    @property
    def negated(self) -> int:
        """How many neurons arrive negated, of all sources."""
        return sum(fact.negated for fact in self.facts)

    @property
    def alone(self) -> int:
        """How many places have no partner, in all sources."""
        return sum(fact.alone for fact in self.facts)


def describe_groups(result: FusionResult) -> list[GroupFacts]:
    """Returns one record per group that was fused, in the order of the plan: about that of the layers."""
    places = {}
    for step in result.plan.steps:
        places.update(dict.fromkeys(step.groups, step.number))
    described = []
    for report in sorted(result.groups, key=lambda report: places.get(report.name, len(places))):
        couplings = tuple(result.alignment.couplings.get(report.name, ()))
        facts = tuple(_facts(members_of(coupling)) for coupling in couplings)
        orders = max((len(members_of(coupling)) for coupling in couplings), default=1)
        described.append(GroupFacts(report, couplings, facts, orders, _symmetries_of(report.name, result)))
    return described


def _symmetries_of(group: str, result: FusionResult) -> tuple[str, ...]:
    return tuple(name for name, places in result.alignment.symmetries.items() if group in places)


def members_of(coupling: Coupling | FamilyCoupling) -> list[Coupling]:
    """Returns the couplings that a coupling consists of: itself, or the members of a family."""
    return list(coupling.members.values()) if isinstance(coupling, FamilyCoupling) else [coupling]


def _facts(members: Sequence[Coupling]) -> CouplingFacts:
    moved = [_moved(member) for member in members]
    is_rotation = any(member.is_exact and not member.is_permutation for member in members)
    counts = [count for count in moved if count is not None]
    return CouplingFacts(
        size=members[0].source_size,
        is_permutation=all(member.is_permutation for member in members),
        moved=sum(counts) if len(counts) == len(moved) else None,
        negated=0 if is_rotation else sum(int((member.signed_plan().sum(1) < 0).sum()) for member in members),
        alone=sum(_alone(member) for member in members),
        partners=sum(_partners(member) for member in members) / len(members),
        is_rotation=is_rotation,
    )


def _moved(coupling: Coupling) -> int | None:
    if coupling.target_size != coupling.source_size:
        return None
    partners, presence = coupling.partners(), coupling.presence()
    is_elsewhere = partners != torch.arange(coupling.target_size, device=partners.device)
    return int((is_elsewhere if presence is None else is_elsewhere & (presence > 0)).sum())


def _alone(coupling: Coupling) -> int:
    presence = coupling.presence()
    return 0 if presence is None else int((presence == 0).sum())


def _partners(coupling: Coupling) -> float:
    rows = coupling.average_map()
    rows = rows[rows.sum(1) > 0]
    return float(torch.special.entr(rows).sum(1).exp().mean()) if rows.numel() else 0.0
