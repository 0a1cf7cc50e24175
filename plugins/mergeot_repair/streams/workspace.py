"""What all steps of a refit of streams work with: the networks, their runs, and how their streams are linked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, fx

from mergekit_ot import ModelGraph, RepairContext, RepairSource
from mergeot_repair.programs.maps import LinearMap
from mergeot_repair.programs.running import StagedRun
from mergeot_repair.refit.samples import weight_of
from mergeot_repair.refit.targets import taken_back_through
from mergeot_repair.streams.components import Components, linked
from mergeot_repair.streams.finding import Point, Stream
from mergeot_repair.streams.places import rows_read
from mergeot_repair.streams.reading import Map, Translation

_TINY = torch.finfo(torch.float64).tiny


@dataclass
class Workspace:
    """The networks of a refit.

    Attributes:
        context: Of the repair.
        state: Of the fused network; it is changed.
        streams: The streams of the fused network.
        sources: The sources that have a weight.
        shares: Their weights, of a sum of one.
        streams_of: Map → the value its result is added to, where that is fitted before.
        batches: The inputs that are fitted to.
        runs: Of the fused network, one per batch.
        source_runs: Of each source, one per batch.
        components: Stream → what was summed up for it.
        links: Stream → the matrices that lead from the sources' streams to the fused one.
    """

    context: RepairContext
    state: dict[str, Tensor]
    streams: Sequence[Stream]
    sources: Sequence[RepairSource]
    shares: Sequence[float]
    streams_of: Mapping[str, str | None]
    batches: Sequence[tuple[Tensor, ...]] = ()
    runs: Sequence[StagedRun] = ()
    source_runs: Sequence[Sequence[StagedRun]] = ()
    components: dict[str, Components] = field(default_factory=dict)
    links: dict[str, list[Tensor]] = field(default_factory=dict)
    _translations: dict[str, Translation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nodes: dict[str, fx.Node] = {node.name: node for node in self.context.program.graph.nodes}
        self.order = {name: number for number, name in enumerate(self.nodes)}
        self.stream_at = {point.source: stream for stream in self.streams for point in stream.points}
        self.points = {point.source: point for stream in self.streams for point in stream.points}
        self.point_of = {reader.node: point for point in self.points.values() for reader in point.readers}

    @property
    def graph(self) -> ModelGraph:
        """Of the fused network."""
        return self.sources[0].alignment.target

    def graphs(self) -> list[ModelGraph]:
        """Returns the graphs of the sources."""
        return [source.alignment.graphs[source.number] for source in self.sources]

    def names_of(self, parameter: str) -> list[str]:
        """Returns all names of a parameter."""
        return [parameter, *(alias for alias, name in self.graph.aliases.items() if name == parameter)]

    def set(self, parameter: str, value: Tensor) -> None:
        """Writes a parameter of the fused network, under all its names."""
        for name in self.names_of(parameter):
            if name in self.state:
                self.state[name] = value.to(self.state[name].dtype).contiguous()

    def write(self, linear_map: LinearMap, fused: Map) -> None:
        """Writes a linear map of the fused network."""
        self.set(linear_map.weight, weight_of(linear_map, fused.weight, self.state[linear_map.weight]))
        if linear_map.bias is not None:
            self.set(linear_map.bias, fused.shift)

    def settle(self, number: int) -> None:
        """Lets go of what nothing later reads of a batch."""
        self.runs[number].settle()
        for of_source in self.source_runs:
            of_source[number].settle()

    def read(self, source: str, number: int) -> Float[Tensor, "place neuron"]:
        """Returns what the fused network reads at a point."""
        return self.runs[number].values_of([source])[source].flatten(0, -2)

    def read_of_sources(self, source: str, number: int) -> list[Float[Tensor, "place neuron"]]:
        """Returns what the sources read at a point."""
        return [of_source[number].values_of([source])[source].flatten(0, -2) for of_source in self.source_runs]

    def goals(self, writer: LinearMap, stream: Stream, number: int) -> Tensor:
        """Returns what a map is to write: the stream that is wanted behind it, less what is there already."""
        other, links = self.streams_of[writer.node], self.links[stream.group]
        place = writer.output if other is None or writer.added is None else writer.added[0]
        values = [of_source[number].values_of([place])[place] for of_source in self.source_runs]
        wanted = linked(values, links, stream.turns.axes[place])
        if other is None:
            return wanted
        run = self.runs[number]
        return taken_back_through(writer, run, wanted - run.values_of([other])[other])

    def translation(self, point: Point) -> Translation:
        """Returns how what the sources read at a point follows from what the fused network reads there."""
        if point.source not in self._translations:
            stream = self.stream_at[point.source]
            sizes = [link.shape[1] for link in self.links[stream.group]]
            translation = Translation(sizes, self._start(point, stream))
            for number in range(len(self.runs)):
                of_sources = self.read_of_sources(point.source, number)
                translation.add(self.read(point.source, number), of_sources)
                self.settle(number)
            self._translations[point.source] = translation
        return self._translations[point.source]

    def reader_maps(self, linear_map: LinearMap) -> list[Map]:
        """Returns a map of each source as one of what the fused network reads."""
        translation = self.translation(self.point_of[linear_map.node])
        return [translation.reader(linear_map, number, source.state) for number, source in enumerate(self.sources)]

    def _start(self, point: Point, stream: Stream) -> Float[Tensor, "neuron fused"]:
        """Returns what the sources read as a map of what is read here, as far as links and gains tell."""
        before, behind = (rows.double() for rows in rows_read(point, self.runs[0]))
        if stream.turns.fixes_ones:
            before, behind = (rows - rows.mean(1, keepdim=True) for rows in (before, behind))
        size = float(before.norm() / behind.norm().clamp_min(_TINY))
        starts = []
        gains = self.components[stream.group].gains(point.source)
        for link, gain in zip(self.links[stream.group], gains, strict=True):
            largest = (torch.linalg.matrix_norm(link, 2) ** 2).clamp_min(_TINY)
            starts.append(size * gain[:, None] * link.T / largest)
        return torch.cat(starts)
