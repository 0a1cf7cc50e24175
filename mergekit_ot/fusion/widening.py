"""Neurons that hold families, where the fused model has more of them than any source: each is a copy of one.

Heads hold spaces of their own, so a blend of two heads is neither. Where no source has so many heads, the sources are
coupled with one of them, the anchor, in its size, and every fused head is a copy of one of the anchor's: copies
share what they send, and the function stays. A repair may choose real heads for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Int
from torch import Tensor

from mergekit_ot.fusion.faced_tensors import NestedCoupling
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.transport.coupling import Coupling
from mergekit_ot.transport.plan import Plan


@dataclass(frozen=True)
class Anchor:
    """The source that the others are coupled to.

    Attributes:
        source: Its number.
        originals: Group → the anchor's neuron that each fused neuron is a copy of, for the groups that the fused model
            has more neurons of.
    """

    source: int
    originals: Mapping[str, Int[Tensor, " m"]] = field(default_factory=dict)

    def original(self, key: str, fused: int) -> int:
        """Returns the place, in the anchor's size, of a fused neuron."""
        return int(self.originals[key][fused]) if key in self.originals else fused

    def size(self, key: str, fused: ModelGraph) -> int:
        """Returns how many neurons are coupled: as many as the anchor has."""
        return int(self.originals[key].max()) + 1 if key in self.originals else fused.groups[key].size

    def without_copies(self, key: str, values: Tensor, place: int, reads: bool) -> Tensor:
        """Returns values of fused neurons, a dimension of which are copies, in the anchor's size.

        Args:
            key: The group.
            values: Of fused neurons, or of the anchor's already.
            place: The dimension of the group.
            reads: Whether the numbers read the neurons: copies share them.
        """
        originals = self.originals.get(key)
        if originals is None or values.shape[place] != len(originals):
            return values
        counts = originals.bincount()
        first = (originals[None] == torch.arange(len(counts))[:, None]).int().argmax(1)
        found = values.index_select(place, first.to(values.device))
        shape = [1] * found.ndim
        shape[place] = -1
        return found * counts.to(found).reshape(shape) if reads else found

    def widened(self, key: str, nested: NestedCoupling) -> NestedCoupling:
        """Returns a coupling of the anchor's neurons as one of the fused ones, each a copy."""
        if key not in self.originals:
            return nested
        originals: list[int] = self.originals[key].tolist()
        inside = {
            (fused, own): found
            for fused, original in enumerate(originals)
            for (place, own), found in nested.inside.items()
            if place == original
        }
        copies = len(originals) / nested.coupling.target_size
        return replace(
            nested, coupling=copied(nested.coupling, self.originals[key]), cost=copies * nested.cost, inside=inside
        )


def copies_of(own: int, fused: int) -> Int[Tensor, " m"]:
    """Returns which of its own neurons each of more fused neurons is a copy of: all in turn.

    Example:
        >>> copies_of(2, 5).tolist()
        [0, 1, 0, 1, 0]
    """
    return torch.arange(fused) % own


def copied(coupling: Coupling, originals: Int[Tensor, " m"]) -> Plan:
    """Returns the plan by which each fused neuron takes what the one of a coupling takes that it is a copy of.

    Example:
        >>> from mergekit_ot import Permutation
        >>> copied(Permutation.identity(1), copies_of(1, 2)).matrix.tolist()
        [[0.5], [0.5]]
    """
    rows = coupling.transport_plan(torch.empty(0, dtype=torch.float64))[originals.to(coupling.tensors[0].device)]
    return Plan(rows / rows.sum())
