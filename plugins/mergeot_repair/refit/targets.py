"""What the sources make where maps are fitted, kept from the pass over them that precedes the choice of neurons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergekit_ot import RepairContext
from mergeot_repair.programs.maps import RECURRENT, LinearMap, taken_back
from mergeot_repair.programs.running import HeldBytes, StagedRun
from mergeot_repair.refit.samples import made_rows, row_count, rows_of
from mergeot_repair.refit.wide import most_samples

# Places of an image are samples that resemble each other: so many per input of a map, and so many at least, say as much
# as all of them.
_SAMPLES_PER_INPUT, _LEAST_SAMPLES = 60, 20_000
# A choice of neurons, layer by layer, needs fewer; on residual streams, chosen as a whole, fewer made one pair in three
# worse by three points.
_CHOICE_SAMPLES_PER_INPUT, _LEAST_OF_A_LAYER = 4, 10_000
# Share of what may be held that targets may take: where its own values find no room, a run starts again and again.
_SHARE_OF_ROOM = 0.5


@dataclass(frozen=True)
class Target:
    """What a map is to make on some places of a batch.

    Attributes:
        shape: Of what the map makes on the whole batch.
        rows: The numbers of the places.
        of_sources: What each source makes there, or the stream that it is added to.
    """

    shape: torch.Size
    rows: Int[Tensor, " sample"]
    of_sources: tuple[Float[Tensor, "samples outputs"], ...]

    @property
    def size(self) -> int:
        """Bytes of what the sources make."""
        return sum(part.numel() * part.element_size() for part in self.of_sources)


class Targets:
    """What the maps of a fused model are to make, batch by batch.

    Args:
        context: Of the repair.
        maps: The linear maps of the fused model, in the order in which they are fitted.
        source_runs: The runs of each source that has a weight, a run per batch.
        room: What may be held.
        share: One in so many of the samples that a fit takes is taken.
    """

    def __init__(
        self,
        context: RepairContext,
        maps: Sequence[LinearMap],
        source_runs: Sequence[Sequence[StagedRun]],
        room: HeldBytes,
        share: int = 1,
    ) -> None:
        self.context, self.maps, self.runs, self.room = context, maps, source_runs, room
        self.batches, self.share = len(source_runs[0]), share
        self.streams = _streams(context, maps)
        self._generator = torch.Generator().manual_seed(0)
        self._places: dict[tuple[str, int], Int[Tensor, " sample"]] = {}
        self._kept: dict[tuple[str, int], Target] = {}

    def draw(self, readers: Mapping[str, int], is_at_once: bool) -> None:
        """Draws which places are taken for the choice of neurons and for the fits, in the order of the two.

        Args:
            readers: Weights of the maps that the choice reads → how many inputs they have in all sources.
            is_at_once: Whether the neurons of all layers are chosen together.
        """
        least = _LEAST_SAMPLES if is_at_once else _LEAST_OF_A_LAYER
        plain = [linear_map for linear_map in self.maps if linear_map.kind != RECURRENT]
        for number in range(self.batches):
            for linear_map in plain:
                if linear_map.weight in readers:
                    wanted = max(least, _CHOICE_SAMPLES_PER_INPUT * readers[linear_map.weight])
                    self._places[f"choice {linear_map.node}", number] = self._drawn(self._count(linear_map), wanted)
        for linear_map in plain:
            for number in range(self.batches):
                self._places[linear_map.node, number] = self._drawn(self._count(linear_map), self._wanted(linear_map))

    def sample_count(self, linear_map: LinearMap) -> int:
        """Returns how many samples a map is fitted to."""
        return sum(len(self._places[linear_map.node, number]) for number in range(self.batches))

    def choice_rows(self, linear_map: LinearMap, number: int, made: Tensor) -> Int[Tensor, " sample"]:
        """Returns the places of a batch that the choice of neurons takes; they are let go of.

        Args:
            linear_map: The map.
            number: Of the batch.
            made: What a source's map makes on it.
        """
        return _within(self._places.pop((f"choice {linear_map.node}", number)), row_count(linear_map, made))

    def keep(self, linear_map: LinearMap, number: int) -> None:
        """Takes what the sources make on a batch, if there is room for it, so that they need not be run again."""
        target = self._run(linear_map, number)
        if self.room.claim(target.size, _SHARE_OF_ROOM):
            self._kept[linear_map.node, number] = target

    def take(self, linear_map: LinearMap, number: int) -> Target:
        """Returns what the sources make on a batch, which is let go of."""
        target = self._kept.pop((linear_map.node, number), None)
        if target is not None:
            self.room.release(target.size)
            return target
        target = self._run(linear_map, number)
        for of_source in self.runs:
            of_source[number].settle()
        return target

    def _run(self, linear_map: LinearMap, number: int) -> Target:
        """Runs the sources to where a map has made its outputs."""
        other, made = self.streams[linear_map.node], []
        for of_source in self.runs:
            run = of_source[number]
            values = run.values_of([linear_map.output, *([other] if other is not None else [])])
            streams = [] if other is None else [taken_back_through(linear_map, run, values[other])]
            made.append([values[linear_map.output], *streams])
        first = made[0][0]
        rows = _within(self._places[linear_map.node, number], row_count(linear_map, first))
        parts = []
        for output, *streams in made:
            part = made_rows(linear_map, output, rows)
            parts.append(part + made_rows(linear_map, streams[0], rows) if streams else part)
        return Target(first.shape, rows, tuple(parts))

    def _count(self, linear_map: LinearMap) -> int:
        """Returns how many samples or places of a batch there are, where batches have the size that was traced."""
        return row_count(linear_map, self.runs[0][0].nodes[linear_map.output].meta["val"])

    def _wanted(self, linear_map: LinearMap) -> int:
        inputs = rows_of(linear_map, self.context.fused[linear_map.weight]).shape[1]
        wanted, most = max(_LEAST_SAMPLES, _SAMPLES_PER_INPUT * inputs), most_samples(inputs)
        return wanted if most is None else min(wanted, most)

    def _drawn(self, count: int, wanted: int) -> Int[Tensor, " sample"]:
        # A copy, since what is left of a permutation would keep all of it.
        return torch.randperm(count, generator=self._generator)[: wanted // (self.batches * self.share)].clone()


def _within(rows: Int[Tensor, " sample"], count: int) -> Int[Tensor, " sample"]:
    """Returns the places that there are: a batch may be smaller than the one that was traced."""
    return rows[rows < count]


def taken_back_through(linear_map: LinearMap, run: StagedRun, stream: Tensor) -> Tensor:
    """Returns a stream as it would stand before the movements between a map and its sum with the stream."""
    return taken_back(stream, [run.nodes[name] for name in linear_map.path])


def _streams(context: RepairContext, maps: Sequence[LinearMap]) -> dict[str, str | None]:
    """Returns map → the value it is added to, if every map that this value depends on is fitted before."""
    nodes = {node.name: node for node in context.program.graph.nodes}
    waiting = {linear_map.node for linear_map in maps}
    streams: dict[str, str | None] = {}
    for linear_map in maps:
        streams[linear_map.node] = None
        if linear_map.added is not None:
            needed, open_nodes = set[str](), [nodes[linear_map.added[1]]]
            while open_nodes:
                node = open_nodes.pop()
                if node.name not in needed:
                    needed.add(node.name)
                    open_nodes += node.all_input_nodes
            if not needed & waiting:
                streams[linear_map.node] = linear_map.added[1]
        waiting.discard(linear_map.node)
    return streams
