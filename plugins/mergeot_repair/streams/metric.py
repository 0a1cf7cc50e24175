"""Which directions of a stream count: those that later maps read."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from mergeot_repair.programs.maps import LINEAR, LinearMap
from mergeot_repair.refit.samples import rows_of
from mergeot_repair.streams.finding import Point, Stream
from mergeot_repair.streams.workspace import Workspace

_TINY = torch.finfo(torch.float64).tiny


def metric_root(work: Workspace, stream: Stream, after: str) -> Float[Tensor, "fused fused"]:
    """Returns the symmetric root of the metric of what is read of a stream behind an operation.

    It is the sum of the Gram matrices of all maps that read there in the sources, in the fused stream's axes, each
    relative to the mean square of what its map makes.
    """
    total = torch.zeros(stream.size, stream.size, dtype=torch.float64)
    for rows, size in _readers_behind(work, stream, after):
        total += rows.T @ rows / size
    if not bool(total.any()):
        return torch.eye(stream.size, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(total)
    return vectors @ (values.clamp_min(0).sqrt()[:, None] * vectors.T)


def _readers_behind(
    work: Workspace, stream: Stream, after: str
) -> Iterator[tuple[Float[Tensor, "output fused"], float]]:
    """Yields the rows of every source's maps that read a stream behind an operation, in the fused stream's axes.

    With each, the sum of squares of what it makes.
    """
    for point in stream.points:
        if work.order[point.source] <= work.order[after]:
            continue
        components = work.components[stream.group]
        gains, grams = components.gains(point.source), components.own_grams(point.source)
        for linear_map in _readers(stream, point):
            for number, source in enumerate(work.sources):
                rows = rows_of(linear_map, source.state[linear_map.weight]).double() * gains[number]
                if stream.turns.fixes_ones:
                    rows = rows - rows.mean(1, keepdim=True)
                size = float(((rows @ grams[number]) * rows).sum())
                yield rows @ work.links[stream.group][number].T, max(size, _TINY)


def _readers(stream: Stream, point: Point) -> list[LinearMap]:
    tie = stream.roles.tie
    tied = (
        [LinearMap(LINEAR, tie.node, tie.source, tie.weight)] if tie is not None and tie.source == point.source else []
    )
    return [*point.readers, *tied]
