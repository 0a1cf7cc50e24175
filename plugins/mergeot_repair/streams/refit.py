"""Rebuilds the streams of a fused network, and every map that reads or writes them, in the order of the program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot import RepairContext, named_arguments
from mergeot_repair.programs.maps import LinearMap
from mergeot_repair.programs.running import StagedRun
from mergeot_repair.refit.pruning import Products
from mergeot_repair.refit.regression import Sums
from mergeot_repair.refit.samples import made_rows, regression_rows, rows_of, weight_of
from mergeot_repair.refit.selection import Selection
from mergeot_repair.refit.targets import taken_back_through
from mergeot_repair.streams.between import Between
from mergeot_repair.streams.branches import Branch, BranchFinder, rows_of_units
from mergeot_repair.streams.choice import PULL, Values, chosen_units, start_of_units
from mergeot_repair.streams.components import Components, linked
from mergeot_repair.streams.finding import Point, Stream, StreamFinder, ancestors, rows_at
from mergeot_repair.streams.metric import Metric, SourceStream
from mergeot_repair.streams.proof import along
from mergeot_repair.streams.reading import Map, Translation, strength_for
from mergeot_repair.streams.tying import NormFit

# Places of a stream that are fitted to: more change nothing.
_PLACES = 50_000


class StreamRefit:
    """The streams of a fused network.

    Args:
        context: Of the repair.
        maps: The linear maps of the fused network.
        used: Numbers of the sources that have a weight.
        state: Of the fused network; it is changed.
        streams_of: Map → the value its result is added to, where that is fitted before.
    """

    def __init__(
        self,
        context: RepairContext,
        maps: Sequence[LinearMap],
        used: Sequence[int],
        state: dict[str, Tensor],
        streams_of: Mapping[str, str | None],
    ) -> None:
        self.context, self.state, self.streams_of = context, state, streams_of
        self.sources = [context.sources[number] for number in used]
        shares = [context.model_weights[number] for number in used]
        self.shares = [share / sum(shares) for share in shares]
        self.finder = StreamFinder(context, maps)
        self.graph, self.nodes = self.finder.graph, self.finder.nodes
        self.streams = self.finder.find()
        slots = context.program.slots
        branches = BranchFinder(self.graph, self.nodes, slots, self.streams).find()
        self.branches = {branch.writer.node: branch for branch in branches if self._fits(branch)}
        self.inner = {reader.weight for branch in self.branches.values() for reader in branch.readers}
        self.readers = {r.node: point for s in self.streams for point in s.points for r in point.readers}
        self.stream_of_point = {point.source: stream for stream in self.streams for point in stream.points}
        self.writers = {writer.node: stream for stream in self.streams for writer in stream.roles.writers}
        self.links: dict[str, list[Tensor]] = {}
        self.metrics: dict[str, Metric] = {}
        self.translations: dict[str, Translation] = {}
        self.runs: list[StagedRun] = []
        self.source_runs: list[list[StagedRun]] = []
        self.order = {name: number for number, name in enumerate(self.nodes)}

    @property
    def groups(self) -> set[str]:
        """The groups that are chosen here."""
        return {branch.group for branch in self.branches.values()}

    def owns(self, linear_map: LinearMap) -> bool:
        """Whether a map is fitted here."""
        return linear_map.node in self.readers or linear_map.node in self.writers

    def _fits(self, branch: Branch) -> bool:
        """Whether heads of all sources have as many rows as those of the fused network."""
        if branch.values is None:
            return True
        graphs = [self.graph, *(source.alignment.graphs[source.number] for source in self.sources)]
        shapes = set()
        for graph in graphs:
            sizes = []
            for reader in branch.readers:
                rows = rows_of_units(graph.layouts[reader.weight][0], branch.group, branch.values)
                sizes.append(None if rows is None else rows.patterns.shape[1])
            shapes.add(tuple(sizes))
        return len(shapes) == 1

    def prepare(self, runs: Sequence[StagedRun], source_runs: Sequence[Sequence[StagedRun]]) -> None:
        """Finds the fused streams, and writes what is an exact image of what the sources have.

        Args:
            runs: Of the fused network, one per batch.
            source_runs: Of each used source, one per batch.
        """
        count = self._batches(len(runs))
        self.runs = list(runs[:count])
        self.source_runs = [list(of_source[:count]) for of_source in source_runs]
        self.components = components = {stream.group: self._components(stream) for stream in self.streams}
        points = sorted(self.stream_of_point, key=self.order.__getitem__)
        by_source = {point.source: point for stream in self.streams for point in stream.points}
        for number in range(count):
            for name in points:
                point, stream = by_source[name], self.stream_of_point[name]
                values = [run[number].values_of([point.stream, point.source]) for run in self.source_runs]
                rows = [rows_at(value[point.stream], point.axis) for value in values]
                read = [value[point.source].flatten(0, -2) for value in values]
                components[stream.group].add(name, rows, read)
            for of_source in self.source_runs:
                of_source[number].release()
        for stream in self.streams:
            self.links[stream.group] = components[stream.group].links()
            sides = [
                SourceStream(source.state, link)
                for source, link in zip(self.sources, self.links[stream.group], strict=True)
            ]
            self.metrics[stream.group] = Metric(stream, components[stream.group], sides, frozenset(self.inner))
            self._write_images(stream)

    def _batches(self, count: int) -> int:
        places = 1
        for stream in self.streams:
            for point in stream.points:
                value = self.nodes[point.source].meta["val"]
                places = max(places, value.numel() // value.shape[-1])
        return min(count, max(1, -(-_PLACES // places)))

    def _components(self, stream: Stream) -> Components:
        sizes = [source.alignment.graphs[source.number].groups[stream.group].size for source in self.sources]
        return Components(stream, sizes, self.shares)

    def _set(self, parameter: str, value: Tensor) -> None:
        for name in self.finder.names_of(parameter):
            if name in self.state:
                self.state[name] = value.to(self.state[name].dtype).contiguous()

    def _write_images(self, stream: Stream) -> None:
        roles, links = stream.roles, self.links[stream.group]
        images = list(stream.images)
        for writer in roles.writers:
            if writer.weight in stream.exact:
                images.append((writer.weight, 0))
                images += [] if writer.bias is None else [(writer.bias, 0)]
        if roles.tie is not None:
            images.append((roles.tie.weight, 1))
        for parameter, axis in images:
            values = [source.state[parameter].double() for source in self.sources]
            self._set(parameter, linked(values, links, axis))
        for parameter, number in roles.gains.items():
            self._set(parameter, torch.full_like(self.state[parameter], number))
        for parameter, node in stream.offsets.items():
            self._set(parameter, torch.full_like(self.state[parameter], self._offset(stream, node)))

    def _offset(self, stream: Stream, node: str) -> float:
        """Returns what is added behind a norm: ones, where a reader without a bias can use them for one."""
        readers = [reader for point in stream.points if point.source == node for reader in point.readers]
        return float(stream.turns.fixes_ones and any(reader.bias is None for reader in readers))

    def fit(self, linear_map: LinearMap, selection: Selection) -> None:
        """Fits a map; those that read for a branch are fitted with the map that writes it."""
        if linear_map.node in self.readers:
            if linear_map.weight not in self.inner:
                self._write_reader(linear_map, selection)
            return
        stream = self.writers[linear_map.node]
        if linear_map.weight in stream.exact:
            return
        branch = self.branches.get(linear_map.node)
        start = None
        if branch is not None:
            start = self._fit_branch(branch)
        self._fit_writer(linear_map, stream, start)

    def _translation(self, point: Point) -> Translation:
        """Returns how what the sources read at a point follows from what the fused network reads."""
        if point.source not in self.translations:
            stream = self.stream_of_point[point.source]
            sizes = [link.shape[1] for link in self.links[stream.group]]
            translation = Translation(sizes, self._start_of_reading(point))
            for number, run in enumerate(self.runs):
                read = run.values_of([point.source])[point.source].flatten(0, -2)
                of_sources = [
                    of_source[number].values_of([point.source])[point.source].flatten(0, -2)
                    for of_source in self.source_runs
                ]
                translation.add(read, of_sources)
                self._settle(number)
            self.translations[point.source] = translation
        return self.translations[point.source]

    def _start_of_reading(self, point: Point) -> Float[Tensor, "neuron fused"]:
        """Returns what the sources read as a map of what is read here, as far as the links tell."""
        stream = self.stream_of_point[point.source]
        values = self.runs[0].values_of([point.stream, point.source])
        stretched = rows_at(values[point.stream], point.axis).double()
        read = values[point.source].flatten(0, -2).double()
        if stream.turns.fixes_ones:
            stretched, read = (rows - rows.mean(1, keepdim=True) for rows in (stretched, read))
        size = float(stretched.norm() / read.norm().clamp_min(torch.finfo(torch.float64).tiny))
        parts = []
        gains = self.components[stream.group].gains(point.source)
        for link, gain in zip(self.links[stream.group], gains, strict=True):
            parts.append(size * gain[:, None] * link.T / torch.linalg.matrix_norm(link, 2) ** 2)
        return torch.cat(parts)

    def _settle(self, number: int) -> None:
        self.runs[number].settle()
        for of_source in self.source_runs:
            of_source[number].settle()

    def _reader_maps(self, linear_map: LinearMap) -> list[Map]:
        translation = self._translation(self.readers[linear_map.node])
        return [translation.reader(linear_map, number, source.state) for number, source in enumerate(self.sources)]

    def _write_reader(self, linear_map: LinearMap, selection: Selection) -> None:
        """Writes a map that no branch reads: chosen neurons, or the mean of aligned ones."""
        maps = self._reader_maps(linear_map)
        chosen = selection.rows(linear_map.weight)
        if chosen is not None:
            fused = Map(torch.cat([m.weight for m in maps])[chosen], torch.cat([m.shift for m in maps])[chosen])
        else:
            weights, shifts = [], []
            for source, share, of_source in zip(self.sources, self.shares, maps, strict=True):
                weights.append(share * source.in_fused_order(of_source.weight, 0, linear_map.weight))
                shifts.append(share * source.in_fused_order(of_source.shift, 0, linear_map.weight))
            fused = Map(torch.stack(weights).sum(0), torch.stack(shifts).sum(0))
        self._write(linear_map, fused)

    def _write(self, linear_map: LinearMap, fused: Map) -> None:
        weight = self.state[linear_map.weight]
        self._set(linear_map.weight, weight_of(linear_map, fused.weight, weight))
        if linear_map.bias is not None:
            self._set(linear_map.bias, fused.shift)

    def _goals(self, writer: LinearMap, stream: Stream, number: int) -> Tensor:
        """Returns what a map is to write: the stream that is wanted behind it, less what is there already."""
        other, links = self.streams_of[writer.node], self.links[stream.group]
        place = writer.output if other is None or writer.added is None else writer.added[0]
        values = [of_source[number].values_of([place])[place] for of_source in self.source_runs]
        wanted = linked(values, links, stream.turns.axes[place])
        if other is None:
            return wanted
        run = self.runs[number]
        left = wanted - run.values_of([other])[other]
        return taken_back_through(writer, run, left)

    def _fit_writer(self, writer: LinearMap, stream: Stream, start: Tensor | None) -> None:
        outputs, inputs = rows_of(writer, self.state[writer.weight]).shape
        sums = Sums(inputs, outputs)
        arguments = named_arguments(self.nodes[writer.node])
        for number, run in enumerate(self.runs):
            goals = self._goals(writer, stream, number)
            values = run.values_of([writer.source])[writer.source]
            sums.add(*regression_rows(writer, self.state[writer.weight], arguments, values, goals))
            self._settle(number)
        start = torch.zeros(outputs, inputs) if start is None else start
        solution = sums.solve(start, writer.has_shift, strength_for(sums))
        self._write(writer, Map(solution.weight, solution.shift))

    def _fit_branch(self, branch: Branch) -> Float[Tensor, "outputs inputs"]:
        """Chooses heads or neurons, writes the maps that read for them, and returns a start for the one that writes."""
        maps = {reader.weight: self._reader_maps(reader) for reader in branch.readers}
        sides = [
            Between(branch, source, {weight: of_sources[number] for weight, of_sources in maps.items()})
            for number, source in enumerate(self.sources)
        ]
        products = Products(branch.writer.has_shift, PULL)
        queries = 1
        for number, run in enumerate(self.runs):
            read = run.values_of({reader.source for reader in branch.readers})
            inputs = self._inputs(number)
            goals = made_rows(
                branch.writer, self._goals(branch.writer, branch.stream, number), torch.arange(self._count(branch, number))
            )
            if branch.values is None:
                held = [side.neurons(inputs, read) for side in sides]
            else:
                mixed = [side.patterns(inputs, read) for side in sides]
                queries = mixed[0].shape[2]
                held = [of_side.flatten(1) for of_side in mixed]
            products.add_parts(held, [goals])
            self._settle(number)
        counts = [side.units for side in sides]
        later = [p for p in branch.stream.points if self.order[p.source] > self.order[branch.writer.node]]
        root = self.metrics[branch.stream.group].root(later)
        columns = rows_of_units(self.graph.layouts[branch.writer.weight][1], branch.group, branch.values)
        assert columns is not None
        most = len(columns.patterns if branch.values is None else columns.values)
        kept = chosen_units(products, root, counts, most)
        values = None
        if branch.values is not None:
            fitted = Values(products, root, kept, sum(counts), queries)
            rank = columns.values.shape[1] // queries
            values = own_values(sides, rank) if len(sides) == 1 and len(kept) == sum(counts) else None
            values = fitted.fit(rank) if values is None else values
            begun = fitted.start(values)
        else:
            begun = start_of_units(products, kept, len(root))
        self._write_units(branch, sides, kept, values)
        start = torch.zeros(*rows_of(branch.writer, self.state[branch.writer.weight]).shape, dtype=torch.float64)
        start[:, (columns.patterns if branch.values is None else columns.values)[: len(kept)].flatten()] = begun
        return start

    def _inputs(self, number: int) -> tuple[Tensor, ...]:
        return self.batches[number]

    def _count(self, branch: Branch, number: int) -> int:
        value = self.nodes[branch.writer.output].meta["val"]
        return value.numel() // value.shape[branch.writer.values_axis]

    def _write_units(self, branch: Branch, sides: Sequence[Between], kept: Tensor, values: Tensor | None) -> None:
        counts = [side.units for side in sides]
        owners = torch.repeat_interleave(torch.arange(len(sides)), torch.tensor(counts))[kept]
        firsts = torch.tensor([sum(counts[:n]) for n in range(len(counts))])
        own = kept - firsts[owners]
        for reader in branch.readers:
            rows = rows_of_units(self.graph.layouts[reader.weight][0], branch.group, branch.values)
            assert rows is not None
            old = self.state[reader.weight]
            weight = torch.zeros(*rows_of(reader, old).shape, dtype=torch.float64)
            shift = torch.zeros(len(weight), dtype=torch.float64)
            for unit, (owner, place) in enumerate(zip(owners.tolist(), own.tolist(), strict=True)):
                side = sides[owner]
                of_side = side.readers[reader.weight]
                linear = side.maps[reader.weight]
                weight[rows.patterns[unit]] = linear.weight[of_side.patterns[place]]
                shift[rows.patterns[unit]] = linear.shift[of_side.patterns[place]]
                if values is not None and rows.values.shape[1]:
                    weight[rows.values[unit]] = values[unit]
            self._write(reader, Map(weight, shift))
        for name, axis in branch.parameters:
            value = self.state[name].clone()
            for unit, (owner, place) in enumerate(zip(owners.tolist(), own.tolist(), strict=True)):
                value.select(axis, unit).copy_(self.sources[owner].state[name].select(axis, place))
            self._set(name, value)

    batches: Sequence[tuple[Tensor, ...]] = ()

    def finish(self) -> None:
        """Ties what is to be tied."""
        for stream in self.streams:
            if stream.roles.tie is not None:
                self._tie(stream)

    def _tie(self, stream: Stream) -> None:
        tie = stream.roles.tie
        assert tie is not None
        point = next(p for p in stream.points if p.source == tie.source)
        translation = self._translation(point)
        head = torch.zeros(*self.state[tie.weight].shape, dtype=torch.float64)
        for number, (source, share) in enumerate(zip(self.sources, self.shares, strict=True)):
            linear = LinearMap("linear", tie.node, tie.source, tie.weight)
            head += share * translation.reader(linear, number, source.state).weight
        scale = float(head.norm() / self.state[tie.weight].double().norm())
        names = [name for name, _ in stream.images] + [tie.weight]
        for writer in stream.roles.writers:
            names += [writer.weight] + ([] if writer.bias is None else [writer.bias])
        for name in names:
            self._set(name, scale * self.state[name].double())
        self._fit_norm(stream, point, tie.weight)

    def _fit_norm(self, stream: Stream, point: Point, weight: str) -> None:
        """Fits the norm before an embedding that is read."""
        between = ancestors(self.nodes[point.source], [self.nodes[point.stream]])
        names = {self.graph.aliases.get(name, name) for node, name in self.context.program.state_names.items() if node in between}
        gains = [name for name, number in stream.roles.gains.items() if name in names and number == 1.0]
        shifts = [name for name in stream.offsets if name in names]
        fit = NormFit(self.state[weight])
        for number, run in enumerate(self.runs):
            read = run.values_of([point.source])[point.source].flatten(0, -2)
            goals = []
            for source, share, of_source in zip(self.sources, self.shares, self.source_runs, strict=True):
                behind = of_source[number].values_of([point.source])[point.source].flatten(0, -2)
                goals.append(share * behind @ source.state[weight].T)
            fit.add(read, torch.stack(goals).sum(0))
            self._settle(number)
        solved = fit.solve(len(gains) == 1, len(shifts) == 1)
        for found_names, value in zip((gains, shifts), solved, strict=True):
            if len(found_names) == 1:
                self._set(found_names[0], value)


def own_values(sides: Sequence[Between], rank: int) -> Tensor | None:
    """Returns the rows that make the values of all sources' heads; None where they have another number of them."""
    rows = torch.cat([side.value_rows() for side in sides])
    return rows if rows.shape[1] == rank else None


__all__ = ["StreamRefit", "along"]
