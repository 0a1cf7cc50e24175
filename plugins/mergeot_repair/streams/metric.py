"""Which directions of a stream count: those that later maps read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mergeot_repair.streams.components import Components
from mergeot_repair.streams.finding import Point, Stream

# A map that makes results of the network counts as much as so many others.
_RESULTS = 30.0


@dataclass(frozen=True)
class SourceStream:
    """A source's side of a stream: its parameters, and the matrix that leads from its stream to the fused one."""

    state: Mapping[str, Tensor]
    link: Float[Tensor, "fused neuron"]


class Metric:
    """The metrics of a stream.

    Args:
        stream: Of the fused network.
        components: What was summed up for it.
        sides: A side per source.
        inner: The maps that read the stream for a branch of it; all others make results.
    """

    def __init__(
        self, stream: Stream, components: Components, sides: Sequence[SourceStream], inner: frozenset[str]
    ) -> None:
        self.stream, self.components, self.sides, self.inner = stream, components, list(sides), inner

    def root(self, points: Sequence[Point]) -> Float[Tensor, "fused fused"]:
        """Returns the symmetric root of the metric of what is read at some points."""
        width = self.stream.size
        total = torch.zeros(width, width, dtype=torch.float64)
        for point in points:
            for weight, share in self._weights(point):
                for side, gain in zip(self.sides, self.components.gains(point.source), strict=True):
                    rows = (side.state[weight].double() * gain) @ side.link.T
                    gram = rows.T @ rows
                    total += share * gram / gram.trace().clamp_min(torch.finfo(torch.float64).tiny)
        if not bool(total.any()):
            return torch.eye(width, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(total)
        return vectors @ (values.clamp_min(0).sqrt()[:, None] * vectors.T)

    def _weights(self, point: Point) -> list[tuple[str, float]]:
        """Returns the weights that read at a point, and how much each counts."""
        weights = [
            (reader.weight, 1.0 if reader.weight in self.inner else _RESULTS) for reader in point.readers
        ]
        tie = self.stream.roles.tie
        if tie is not None and tie.source == point.source:
            weights.append((tie.weight, _RESULTS))
        return weights
