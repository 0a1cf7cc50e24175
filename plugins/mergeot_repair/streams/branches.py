"""What stands between the maps that read a stream and a map that writes it: neurons, or heads of attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, fx

from mergekit_ot import (
    IN,
    AxisLayout,
    Blocks,
    Factors,
    ModelGraph,
    Neurons,
    ProgramSlot,
    SlotKind,
    layout_size,
    leaf_groups,
)
from mergeot_repair.programs.layouts import stretches
from mergeot_repair.programs.maps import LinearMap
from mergeot_repair.streams.finding import Stream, ancestors


@dataclass(frozen=True)
class Branch:
    """Neurons or heads between maps that read streams and one that writes one.

    Attributes:
        stream: The stream that is written.
        writer: The map that writes it.
        readers: The maps that read streams.
        group: The key of the group of neurons, or of heads.
        values: The key of the group of what each head mixes; None for neurons.
        parameters: Other parameters between the maps that have an entry per head, with the axis of the heads.
    """

    stream: Stream
    writer: LinearMap
    readers: tuple[LinearMap, ...]
    group: str
    values: str | None = None
    parameters: tuple[tuple[str, int], ...] = ()

    def rows(self, graph: ModelGraph, reader: LinearMap) -> Rows:
        """Returns where the units stand among the rows of a reader, in a network."""
        return rows_of_units(graph.layouts[reader.weight][reader.output_axis], self.group, self.values)

    def columns(self, graph: ModelGraph) -> Int[Tensor, "unit column"]:
        """Returns where the units stand among the columns of the writer, in a network."""
        rows = rows_of_units(graph.layouts[self.writer.weight][self.writer.input_axis], self.group, self.values)
        return rows.patterns if self.values is None else rows.values

    @property
    def value_reader(self) -> LinearMap:
        """The reader that makes the values of heads."""
        graph = self.stream.graph
        return next(reader for reader in self.readers if self.rows(graph, reader).values.shape[1])

    def queries(self, graph: ModelGraph) -> int:
        """Returns how many queries share the values of a head, in a network."""
        return self.columns(graph).shape[1] // self.rows(graph, self.value_reader).values.shape[1]


@dataclass(frozen=True)
class Rows:
    """Where the units of a group stand on an axis of a weight, in one network.

    Attributes:
        patterns: Indices ``[unit, row]`` of what is no value.
        values: Indices ``[unit, row]`` of values.
    """

    patterns: Int[Tensor, "unit row"]
    values: Int[Tensor, "unit row"]


def rows_of_units(layout: AxisLayout, group: str, values: str | None) -> Rows:
    """Returns where the units of a group stand on an axis on which nothing else stands (`stands_alone`)."""
    parts = layout.parts if isinstance(layout, Blocks) else (layout,)
    patterns: list[Tensor] = []
    mixed: list[Tensor] = []
    start = 0
    for part in parts:
        factors = part.parts if isinstance(part, Factors) else (part,)
        inner = [key for factor in factors[1:] for key in leaf_groups(factor)]
        size = layout_size(part)
        index = torch.arange(start, start + size).reshape(layout_size(factors[0]), -1)
        (mixed if values in inner else patterns).append(index)
        start += size
    count = len((patterns + mixed)[0])
    empty = torch.empty(count, 0, dtype=torch.long)
    return Rows(torch.cat([empty, *patterns], 1), torch.cat([empty, *mixed], 1))


def stands_alone(layout: AxisLayout, group: str) -> bool:
    """Whether nothing stands on an axis but units of a group, each with what it has."""
    parts = layout.parts if isinstance(layout, Blocks) else (layout,)
    firsts = [part.parts[0] if isinstance(part, Factors) else part for part in parts]
    return all(isinstance(first, Neurons) and first.group == group for first in firsts)


class BranchFinder:
    """Looks for the branches of a network's streams.

    Args:
        graph: Of the fused network.
        nodes: Its operations by name.
        slots: What its placeholders are.
        streams: Its streams.
    """

    def __init__(
        self,
        graph: ModelGraph,
        nodes: Mapping[str, fx.Node],
        slots: Mapping[fx.Node, ProgramSlot],
        streams: Sequence[Stream],
    ) -> None:
        self.graph, self.nodes, self.slots, self.streams = graph, nodes, slots, streams
        self.readers = {m.node: m for stream in streams for m in stream.roles.readers}
        self.turned = {name for stream in streams for name in stream.turns.axes}

    def find(self) -> list[Branch]:
        """Returns the branches."""
        branches = []
        for stream in self.streams:
            for writer in stream.fitted:
                branch = self._branch(stream, writer)
                if branch is not None:
                    branches.append(branch)
        return branches

    def _branch(self, stream: Stream, writer: LinearMap) -> Branch | None:
        stops = [self.nodes[name] for name in self.readers]
        between = ancestors(self.nodes[writer.source], stops)
        before = {node.name for inner in between for node in inner.all_input_nodes}
        readers = tuple(self.readers[name] for name in self.readers if name in before or name == writer.source)
        if not readers or any(node.name in self.turned for node in between):
            return None
        slots = [self.slots[node] for node in between if node in self.slots]
        names = [slot.target for slot in slots if slot.kind == SlotKind.PARAMETER]
        parameters = sorted({self.graph.aliases.get(name, name) for name in names})
        return self._neurons(stream, writer, readers, parameters) or self._heads(stream, writer, readers, parameters)

    def _neurons(
        self, stream: Stream, writer: LinearMap, readers: tuple[LinearMap, ...], parameters: Sequence[str]
    ) -> Branch | None:
        standing = stretches(self.graph, writer.weight, writer.input_axis) or []
        if len(standing) != 1 or standing[0][1] != 1 or parameters:
            return None
        key = standing[0][0]
        group = self.graph.groups[key]
        if not group.is_free or group.context or group.flags or not self._is_owned(key, writer, readers):
            return None
        for reader in readers:
            if any(
                place != (key, 1) for place in stretches(self.graph, reader.weight, reader.output_axis) or [("", 0)]
            ):
                return None
        return Branch(stream, writer, readers, key)

    def _is_owned(self, key: str, writer: LinearMap, readers: Sequence[LinearMap]) -> bool:
        """Whether a group stands on rows of the readers and columns of the writer alone."""
        rows = {(reader.weight, reader.output_axis) for reader in readers}
        rows |= {(reader.bias, 0) for reader in readers}
        for slot in self.graph.groups[key].members:
            is_column = slot.role == IN and slot.parameter == writer.weight and slot.axis == writer.input_axis
            if not is_column and (slot.parameter, slot.axis) not in rows:
                return False
        return True

    def _heads(
        self, stream: Stream, writer: LinearMap, readers: tuple[LinearMap, ...], parameters: Sequence[str]
    ) -> Branch | None:
        layout = self.graph.layouts[writer.weight][writer.input_axis]
        parts = layout.parts if isinstance(layout, Factors) else ()
        if len(parts) < 2 or not isinstance(parts[0], Neurons) or not isinstance(parts[-1], Neurons):
            return None
        heads, values = parts[0].group, parts[-1].group
        group = self.graph.groups[heads]
        if not group.is_free or group.context or self.graph.groups[values].context != (heads,):
            return None
        per_head = [(name, self._axis_of(name, heads)) for name in parameters]
        layouts = [self.graph.layouts[reader.weight][reader.output_axis] for reader in readers]
        if any(axis is None for _, axis in per_head) or not all(stands_alone(rows, heads) for rows in layouts):
            return None
        rows = [rows_of_units(of_reader, heads, values) for of_reader in layouts]
        makers = [of_reader for of_reader in rows if of_reader.values.shape[1]]
        if len(makers) != 1 or makers[0].values.shape[1] != parts[-1].size:
            return None
        owned = tuple((name, axis) for name, axis in per_head if axis is not None)
        return Branch(stream, writer, readers, heads, values, owned)

    def _axis_of(self, parameter: str, heads: str) -> int | None:
        """Returns the axis of a parameter on which heads stand alone, where nothing else on it may be reordered."""
        axis = None
        for number, layout in enumerate(self.graph.layouts.get(parameter, ())):
            if isinstance(layout, Neurons) and layout.group == heads:
                axis = number
            elif any(self.graph.groups[key].is_free for key in leaf_groups(layout)):
                return None
        return axis
