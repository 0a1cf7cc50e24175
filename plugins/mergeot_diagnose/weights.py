"""What weights alone say about two networks: are their neurons in one order already?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_ot import Alignment, FusionResult, Permutation

# Orders of neurons are told apart by more than chance where aligning gains so much cosine over a random order.
_LEAST_GAIN = 0.02
# Random orders of which the mean is taken: those of small networks differ.
_ORDERS = 3


@dataclass(frozen=True)
class WeightComparison:
    """How alike the weights of two networks are: as they stand, after alignment, and in a random order.

    Attributes:
        cosine: Cosine of all weights at equal places; None where sizes differ.
        aligned: The same after weight matching (arXiv:2209.04836).
        random: The same with the neurons of one network in a random order, in the mean of a few.
        same_place: Share of the neurons whose partner stands at their own place, by group; None where sizes differ.
    """

    cosine: float | None
    aligned: float | None
    random: float | None
    same_place: Mapping[str, float | None]

    @property
    def held(self) -> float | None:
        """How much of what an alignment can gain is there already: 1 is in one order, 0 is no better than chance.

        Example:
            >>> WeightComparison(0.5, 0.5, 0.1, {}).held
            1.0
        """
        if self.cosine is None or self.aligned is None or self.random is None:
            return None
        gain = self.aligned - self.random
        if gain < _LEAST_GAIN:
            # Neither order says anything, unless the weights are equal whatever the order.
            return 1.0 if self.cosine > 1 - _LEAST_GAIN else None
        return min(1.0, max(0.0, (self.cosine - self.random) / gain))


def compare_weights(result: FusionResult, seed: int = 0) -> WeightComparison:
    """Returns what the weights of the first two sources of an aligned fusion say.

    Args:
        result: A fusion by weight matching, each source in its own form.
        seed: Seed of the random orders.
    """
    alignment = result.alignment
    same_place = {key: _same_place(alignment, key) for key in alignment.target.free_groups}
    first, second = (dict(source.state) for source in result.models.sources[:2])
    others = {*alignment.target.buffers, *alignment.uncompared}
    learned = [name for name in alignment.target.layouts if name in first and name not in others]
    if any(first[name].shape != second[name].shape for name in learned):
        return WeightComparison(None, None, None, same_place)
    generator = torch.Generator().manual_seed(seed)
    shuffled = [replace(result, alignment=_in_random_order(alignment, generator)) for _ in range(_ORDERS)]
    aligned, *random = [_cosine(each.aligned_state(0), each.aligned_state(1), learned) for each in (result, *shuffled)]
    return WeightComparison(_cosine(first, second, learned), aligned, sum(random) / _ORDERS, same_place)


def _same_place(alignment: Alignment, key: str) -> float | None:
    """Returns the share of a group's neurons whose partner stands at their place; of a family, of all its members."""
    if key not in alignment.couplings or any(
        graph.groups[key].size != alignment.target.groups[key].size for graph in alignment.graphs
    ):
        return None
    if alignment.target.groups[key].context:
        return None
    first, second = (alignment.coupling(key, source).partners() for source in (0, 1))
    return float((first == second).double().mean())


def _in_random_order(alignment: Alignment, generator: torch.Generator) -> Alignment:
    """Returns the alignment with the neurons of every plain group of the second source in a random order."""
    found = {}
    for key, group in alignment.target.free_groups.items():
        if key in alignment.couplings and not group.context:
            order = torch.randperm(group.size, generator=generator)
            found[key] = (Permutation.identity(group.size), Permutation(order))
    return alignment.with_couplings(found)


def _cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor], names: list[str]) -> float:
    """Returns the mean cosine of the weight tensors, by their sizes: layers with large weights do not decide alone."""
    total, count = 0.0, 0
    for name in names:
        if not one[name].is_floating_point() or one[name].dim() < 2:
            continue
        mine, theirs = one[name].double().flatten(), other[name].double().flatten()
        scale = float(mine.norm() * theirs.norm())
        total += float(mine @ theirs) / scale * mine.numel() if scale else 0.0
        count += mine.numel()
    return total / count if count else 0.0
