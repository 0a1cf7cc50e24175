"""What the sources read of their streams, as linear maps of what the fused network reads of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mergeot_repair.programs.maps import LinearMap
from mergeot_repair.refit.regression import FOLDS, Sums
from mergeot_repair.refit.samples import rows_of

# Of the pull of a regression, where too few batches were seen to choose it.
_STRENGTH = 1e-4


@dataclass(frozen=True)
class Map:
    """Rows of a linear map and what it adds."""

    weight: Float[Tensor, "outputs inputs"]
    shift: Float[Tensor, " outputs"]


class Translation:
    """The regression of what all sources read at a point on what the fused network reads there.

    Every map that reads there is a linear map of it, so that one regression gives all of them.

    Args:
        sizes: How many neurons the stream has in each source.
        start: Where the regression starts.
    """

    def __init__(self, sizes: Sequence[int], start: Float[Tensor, "neuron fused"]) -> None:
        self.sizes, self.start = list(sizes), start
        self.sums = Sums(start.shape[1], sum(sizes))
        self.solved: dict[bool, Map] = {}

    def add(self, read: Float[Tensor, "place fused"], of_sources: Sequence[Float[Tensor, "place neuron"]]) -> None:
        """Adds a batch."""
        self.sums.add(read, torch.cat(list(of_sources), 1))

    def reader(self, linear_map: LinearMap, source: int, state: Mapping[str, Tensor]) -> Map:
        """Returns the rows of a source's map on what the fused network reads.

        Args:
            linear_map: The map.
            source: Which of the sources that were added.
            state: Of the source.
        """
        solution = self._solution(linear_map.bias is not None)
        start = sum(self.sizes[:source])
        stretch = slice(start, start + self.sizes[source])
        rows = rows_of(linear_map, state[linear_map.weight]).double()
        shift = rows @ solution.shift[stretch]
        if linear_map.bias is not None:
            shift = shift + state[linear_map.bias].double()
        return Map(rows @ solution.weight[stretch], shift)

    def gram(self) -> Float[Tensor, "fused fused"]:
        """Returns the inner products of what the fused network reads."""
        return self.sums.gram()

    def _solution(self, has_shift: bool) -> Map:
        if has_shift not in self.solved:
            solution = self.sums.solve(self.start, has_shift, strength_for(self.sums))
            self.solved[has_shift] = Map(solution.weight, solution.shift)
        return self.solved[has_shift]


def strength_for(sums: Sums) -> float | None:
    """Returns the strength of the pull of a regression of which too few batches were seen to choose one."""
    return _STRENGTH if sums.batches < FOLDS else None
