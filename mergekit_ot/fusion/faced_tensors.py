"""Tensors of fused neurons beside those of a source, and the couplings of neurons that hold families of neurons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from mergekit_ot.transport.coupling import Coupling


@dataclass(frozen=True)
class FacedTensors:
    """A tensor of the fused neurons and one of a source, alike in all that is not to be coupled.

    Attributes:
        ours: One dimension per group of `groups`, then a flat one.
        theirs: The same for the source, in densities.
        groups: The groups that are to be coupled.
    """

    ours: Tensor
    theirs: Tensor
    groups: tuple[str, ...]

    def cut(self, group: str, ours: int, theirs: int) -> FacedTensors:
        """Returns the tensors at one neuron of a group each."""
        place = self.groups.index(group)
        rest = (*self.groups[:place], *self.groups[place + 1 :])
        return FacedTensors(self.ours.select(place, ours), self.theirs.select(place, theirs), rest)

    def moved(self, group: str, coupling: Coupling) -> FacedTensors:
        """Returns the tensors with a group coupled: it is no longer open."""
        place = self.groups.index(group)
        theirs = coupling.move(self.theirs, place, False, True).movedim(place, -1).flatten(-2)
        rest = (*self.groups[:place], *self.groups[place + 1 :])
        return FacedTensors(self.ours.movedim(place, -1).flatten(-2), theirs, rest)

    def led_by(self, group: str) -> FacedTensors:
        """Returns the tensors with a group's dimension first."""
        place = self.groups.index(group)
        rest = (*self.groups[:place], *self.groups[place + 1 :])
        return FacedTensors(self.ours.movedim(place, 0), self.theirs.movedim(place, 0), (group, *rest))

    def rows(self) -> tuple[Tensor, Tensor]:
        """Returns both tensors as one row per combination of neurons."""
        return self.ours.reshape(-1, self.ours.shape[-1]), self.theirs.reshape(-1, self.theirs.shape[-1])


@dataclass(frozen=True)
class NestedCoupling:
    """A coupling, and those of the families inside each pair of neurons that it relates.

    Attributes:
        coupling: Of the outer neurons.
        cost: The transport cost, one row's worth per neuron: what is left apart in all tensors.
        inside: (fused neuron, source neuron) → family → its coupling there.
    """

    coupling: Coupling
    cost: float
    inside: Mapping[tuple[int, int], Mapping[str, NestedCoupling]] = field(default_factory=dict)


@dataclass(frozen=True)
class Families:
    """The families that are to be coupled.

    Attributes:
        contexts: Family → the groups that index it.
        rotations: Family → the symmetry by whose rotations it is coupled, for those that are not only reordered.
    """

    contexts: Mapping[str, tuple[str, ...]]
    rotations: Mapping[str, str] = field(default_factory=dict)
