"""The alignment of a fusion: which neurons correspond, and how tensors follow."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Int
from torch import Tensor

from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.layouts import IN, OUT, AxisLayout, resized_layout
from mergekit_ot.graph.symmetry.signs import Sign
from mergekit_ot.graph.symmetry.symmetry import Places
from mergekit_ot.transport.coupling import Coupling
from mergekit_ot.transport.measure import ROTATIONS
from mergekit_ot.transport.permutation import Permutation

DENSITY, PAPER = "density", "paper"

# (index of the fused group's context, index of the source's context) for each group of the context.
Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class FamilyCoupling:
    """The couplings of a family: one per pair of context indices that are coupled themselves."""

    members: Mapping[Pairs, Coupling]

    @functools.cached_property
    def partners(self) -> Int[Tensor, ...] | None:
        """The partners of all neurons, with a dimension for each index of the fused context, the neurons' last.

        None where members have different sizes, or stand at some pairs of a fused index and not at one of each.
        """
        members = [(tuple(fused for fused, _ in pairs), each.partners()) for pairs, each in self.members.items()]
        members.sort(key=operator.itemgetter(0))
        places, rows = [place for place, _ in members], [row for _, row in members]
        lengths = [max(each) + 1 for each in zip(*places, strict=True)]
        if places != list(itertools.product(*map(range, lengths))) or len({len(row) for row in rows}) != 1:
            return None
        return torch.stack(rows).reshape(*lengths, -1)

    @functools.cached_property
    def indices(self) -> dict[object, tuple[tuple[object, ...], Tensor]]:
        """Where neurons stand in tensors, as far as it was asked for: by the groups beside, with their couplings."""
        return {}

    @functools.cached_property
    def is_identity(self) -> bool:
        """Whether every member couples each neuron with the one at the same place, at pairs of the same index."""
        return all(
            member.is_identity and all(fused == own for fused, own in pairs) for pairs, member in self.members.items()
        )

    @functools.cached_property
    def is_permutation(self) -> bool:
        """Whether every member only reorders neurons."""
        return all(member.is_permutation for member in self.members.values())

    @property
    def is_exact(self) -> bool:
        """Whether a source that is moved by the couplings still computes its function."""
        return all(member.is_exact for member in self.members.values())

    def is_same(self, other: object, rtol: float = 0.0, atol: float = 0.0) -> bool:
        """Whether another family couples the same pairs, each in the same way up to a tolerance."""
        if not isinstance(other, FamilyCoupling) or self.members.keys() != other.members.keys():
            return False
        return all(member.is_same(other.members[pairs], rtol, atol) for pairs, member in self.members.items())


def are_same(
    before: Sequence[Coupling | FamilyCoupling],
    after: Sequence[Coupling | FamilyCoupling],
    relative: float = 0.0,
    absolute: float = 0.0,
) -> bool:
    """Whether a group's couplings with all sources are the same, up to a tolerance."""
    return all(old is new or old.is_same(new, relative, absolute) for old, new in zip(before, after, strict=True))


@dataclass(frozen=True)
class Alignment:
    """Group → couplings, one per source.

    Attributes:
        graphs: Graph of each source, in the order of the sources.
        target: Graph of the fused model.
        couplings: Group key → one coupling (or family of couplings) per source.
        symmetries: Name of a symmetry → group key → the numbers on which its elements act, for those that a solver asks
            for (the order of neurons is no question).
        scaling: ``density``, or ``paper`` to average what reads neurons as well (no difference for permutations).
        uncompared: Parameters that follow the couplings and are never compared between sources: heads of which each
            source keeps its own, and what is kept from one source where others have another size.

    Example:
        >>> import torch
        >>> from mergekit_ot import fuse
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> alignment = fuse([net, net], example_inputs=torch.randn(2, 4)).alignment
        >>> alignment.coupling("0.weight:0", 1).partners().tolist(), alignment.is_function_preserving(1)
        ([0, 1, 2], True)
    """

    graphs: tuple[ModelGraph, ...]
    target: ModelGraph
    couplings: Mapping[str, tuple[Coupling | FamilyCoupling, ...]] = field(default_factory=dict)
    symmetries: Mapping[str, Mapping[str, Places]] = field(default_factory=dict)
    scaling: str = DENSITY
    uncompared: frozenset[str] = frozenset()

    @property
    def signs(self) -> Mapping[str, Places]:
        """Group key → the numbers that change sign with a negated neuron, for the groups that may be negated."""
        return self.symmetries.get(Sign.name, {})

    @functools.cached_property
    def directions(self) -> Mapping[str, str]:
        """Group key → name of the largest symmetry that its couplings may use besides the order of neurons."""
        # Rotations come before signs, which are some of them.
        ordered = sorted(self.symmetries, key=lambda name: name not in ROTATIONS, reverse=True)
        return {
            key: name
            for name in ordered
            for key in self.symmetries[name]
            if name not in ROTATIONS or self._has_sizes_to_rotate(key)
        }

    def _has_sizes_to_rotate(self, key: str) -> bool:
        """Whether rotations can lead from every source: sizes are equal, or nothing but readers asks for them.

        Queries meet keys in a sum over the space inside a head, whose scale follows its size.
        """
        group = self.target.groups[key]
        if all(graph.groups[key].size == group.size for graph in self.graphs):
            return True
        return not group.context and any(slot.is_reader for slot in group.members)

    @functools.cached_property
    def rotations(self) -> Mapping[str, str]:
        """Group key → name of the symmetry, for the groups whose neurons may be rotated."""
        return {key: name for key, name in self.directions.items() if name in ROTATIONS}

    def is_open(self, group: str) -> bool:
        """Whether there is something to choose about a group: an order, or a rotation of what is pinned."""
        return self.target.groups[group].is_free or group in self.rotations

    def with_couplings(self, found: Mapping[str, tuple[Coupling | FamilyCoupling, ...]]) -> Alignment:
        """Returns a new alignment in which `found` holds."""
        return replace(self, couplings={**self.couplings, **found})

    def is_aligned(self, group: str | None) -> bool:
        """Whether the neurons of a dimension have their fused order: it stays in place, is pinned, or is coupled."""
        if group is None or group in self.couplings or self.target.groups[group].pin is not None:
            return True
        return all(graph.groups[group].size == 1 for graph in (self.target, *self.graphs))

    def coupling(self, group: str, source: int, pairs: Pairs = ()) -> Coupling:
        """Returns the coupling of a group (of the member at `pairs`, for a family) with one source."""
        if group not in self.couplings:
            return Permutation.identity(self.target.groups[group].size)
        found = self.couplings[group][source]
        return found.members[pairs] if isinstance(found, FamilyCoupling) else found

    def moved_layouts(self, source: int, parameter: str) -> tuple[AxisLayout, ...]:
        """Returns the layouts that a source's parameter has in fused sizes; what stays in place keeps its own size."""
        if parameter not in self.uncompared:
            return self.target.layouts[parameter]
        sizes = {key: group.size for key, group in self.target.groups.items()}
        return tuple(resized_layout(layout, sizes) for layout in self.graphs[source].layouts[parameter])

    def role(self, source: int, parameter: str, axis: int, group: str | None) -> str:
        """Returns how a group's neurons on an axis are transported: ``OUT`` is averaged, ``IN`` is split."""
        role = self.graphs[source].roles.get((parameter, axis, group or ""), "")
        return OUT if self.scaling == PAPER and role == IN else role

    def direction_answers(self, parameter: str, axis: int, group: str | None) -> tuple[bool, ...]:
        """Returns whether the numbers of a group on an axis follow its neurons' direction: once, or per gate."""
        name = self.directions.get(group or "")
        powers = (0,) if name is None else self.symmetries[name][group or ""].get((parameter, axis), (0,))
        return tuple(power != 0 for power in powers)

    def is_function_preserving(self, source: int) -> bool:
        """Whether the source computes the same after it is moved by its couplings."""
        return all(couplings[source].is_exact for couplings in self.couplings.values())
