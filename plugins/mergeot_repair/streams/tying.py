"""An embedding that is read as well stays tied: what is left to fit is the norm before it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mergeot_repair.programs.maps import LINEAR, LinearMap
from mergeot_repair.streams.finding import Point, Stream, ancestors
from mergeot_repair.streams.workspace import Workspace

# Of the regression, relative to its mean diagonal.
_PULL = 1e-6


class NormFit:
    """Regression of the gains and the shifts of a norm whose result an embedding's weight reads.

    The results are ``(read * gains + shifts) @ embedding.T``, linear in both.

    Args:
        embedding: As it is read ``[result, neuron]``.
    """

    def __init__(self, embedding: Float[Tensor, "result neuron"]) -> None:
        self.embedding = embedding.double()
        width = embedding.shape[1]
        self.gram = torch.zeros(width, width, dtype=torch.float64)
        self.sums, self.products, self.wanted = (torch.zeros(width, dtype=torch.float64) for _ in range(3))
        self.count = 0

    def add(self, read: Float[Tensor, "place neuron"], goals: Float[Tensor, "place result"]) -> None:
        """Adds a batch: what the norm makes without gains and shifts, and the results that are wanted."""
        back = goals @ self.embedding.to(goals.dtype)
        self.gram += read.T @ read
        self.sums += read.sum(0)
        self.products += (read * back).sum(0)
        self.wanted += back.sum(0)
        self.count += len(read)

    def solve(self, has_gains: bool, has_shifts: bool) -> tuple[Float[Tensor, " neuron"], Float[Tensor, " neuron"]]:
        """Returns the gains and the shifts."""
        inner = self.embedding.T @ self.embedding
        width = len(inner)
        mixed = inner * self.sums
        matrix = torch.cat([torch.cat([inner * self.gram, mixed.T], 1), torch.cat([mixed, self.count * inner], 1)])
        goals = torch.cat([self.products, self.wanted])
        start = torch.cat([torch.ones(width), torch.zeros(width)]).double()
        is_free = torch.cat([torch.full((width,), has_gains), torch.full((width,), has_shifts)])
        rest = (goals - matrix @ start)[is_free]
        matrix = matrix[is_free][:, is_free]
        if len(matrix):
            matrix.diagonal().add_(_PULL * matrix.diagonal().mean())
            start[is_free] += torch.linalg.solve(matrix, rest)
        return start[:width], start[width:]


def tie_again(work: Workspace, stream: Stream) -> None:
    """Makes an embedding fit as what reads the stream, too: by the size of the stream, and by the norm before it."""
    tie = stream.roles.tie
    if tie is None:
        return
    point = work.points[tie.source]
    translation = work.translation(point)
    head = LinearMap(LINEAR, tie.node, tie.source, tie.weight)
    wanted = torch.zeros(*work.state[tie.weight].shape, dtype=torch.float64)
    for number, (source, share) in enumerate(zip(work.sources, work.shares, strict=True)):
        wanted += share * translation.reader(head, number, source.state).weight
    scale = float(wanted.norm() / work.state[tie.weight].double().norm())
    names = [tie.weight, *(name for name, _ in stream.images)]
    for writer in stream.roles.writers:
        names += [name for name in (writer.weight, writer.bias) if name is not None]
    for name in names:
        work.set(name, scale * work.state[name].double())
    _fit_norm(work, stream, point, tie.weight)


def _fit_norm(work: Workspace, stream: Stream, point: Point, weight: str) -> None:
    """Fits the norm before an embedding that is read."""
    inside = ancestors(work.nodes[point.source], [work.nodes[point.stream]])
    # What other places of the stream are normalised with, too, stays as it is.
    held = work.context.program.state_names.items()
    names = {name for node, name in held if node in inside and len(node.users) == 1}
    gains = [name for name, number in stream.roles.gains.items() if name in names and number == 1.0]
    shifts = [name for name in stream.offsets if name in names]
    fit = NormFit(work.state[weight])
    for number in range(len(work.runs)):
        goals = torch.zeros(())
        behind = work.read_of_sources(point.source, number)
        for source, share, rows in zip(work.sources, work.shares, behind, strict=True):
            goals = goals + share * rows @ source.state[weight].T.to(rows.dtype)
        fit.add(work.read(point.source, number), goals)
        work.settle(number)
    solved = fit.solve(len(gains) == 1, len(shifts) == 1)
    for parameters, value in zip((gains, shifts), solved, strict=True):
        if len(parameters) == 1:
            work.set(parameters[0], value)
