"""Finds the residual streams behind norms of a network, and what reads and writes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from mergekit_ot import ModelGraph, NeuronGroup, RepairContext, SlotKind
from mergeot_repair.programs.layouts import stretches
from mergeot_repair.programs.maps import LinearMap
from mergeot_repair.streams.proof import TurnProof, Turns
from mergeot_repair.streams.roles import Roles, roles_of

# A group that may be transported with equal masses only is normalised over its neurons.
_NORMALISED = "uniform marginals only"


@dataclass(frozen=True)
class Point:
    """A place at which linear maps read a stream.

    Attributes:
        source: The operation whose result they read.
        stream: The operation whose result is the stream that is normalised there.
        readers: The maps.
        path: The operations that lead from the stream to what is read, this included, in their order.
    """

    source: str
    stream: str
    readers: tuple[LinearMap, ...]
    path: tuple[str, ...]


@dataclass(frozen=True)
class Stream:
    """A residual stream that is read behind norms alone.

    Attributes:
        group: The key of its neurons' group.
        size: How many neurons the fused network has there.
        roles: What is done with its parameters.
        turns: What turns with it.
        points: Where it is read, in the order of the program.
        exact: Those of its writers that read inputs of the network alone.
        offsets: Vectors behind norms that are added, each with the operations that add it.
        images: Embeddings and parameters that are added to it, each with the axis of the neurons.
        graph: Of the fused network.
    """

    group: str
    size: int
    roles: Roles
    turns: Turns
    points: tuple[Point, ...]
    exact: frozenset[str]
    offsets: Mapping[str, tuple[str, ...]]
    images: tuple[tuple[str, int], ...]
    graph: ModelGraph = field(repr=False, compare=False)

    @property
    def fitted(self) -> tuple[LinearMap, ...]:
        """The writers that are fitted."""
        return tuple(writer for writer in self.roles.writers if writer.weight not in self.exact)


class StreamFinder:
    """Looks for the streams of the fused network of a repair.

    Args:
        context: Of the repair.
        maps: The linear maps of the fused network.
    """

    def __init__(self, context: RepairContext, maps: Sequence[LinearMap]) -> None:
        self.context, self.maps = context, maps
        self.graph: ModelGraph = context.sources[0].alignment.target
        self.nodes = {node.name: node for node in context.program.graph.nodes}

    def find(self) -> list[Stream]:
        """Returns the streams."""
        streams = []
        for group in self.graph.free_groups.values():
            if any(slot.parameter in self.context.kept | self.context.joined for slot in group.members):
                continue  # what is kept in one source's order cannot be turned
            roles = None if group.context else roles_of(group, self.graph, self.context.program, self.maps)
            # Only what is normalised is worth a proof: by an operation, or by several before a gain.
            if roles is not None and (_NORMALISED in group.flags or roles.gains):
                stream = self._stream(group, roles)
                streams += [] if stream is None else [stream]
        return streams

    def names_of(self, parameter: str) -> list[str]:
        """Returns all names of a parameter."""
        return [parameter, *(alias for alias, name in self.graph.aliases.items() if name == parameter)]

    def _stream(self, group: NeuronGroup, roles: Roles) -> Stream | None:
        inputs = next(iter(self.context.batches))
        proof = TurnProof(self.context.program, self.context.fused, inputs, self.names_of)
        turns = proof.turns(roles, group.size)
        if turns is None or not self._is_read_behind_norms(turns, roles):
            return None
        points = self._points(turns, roles)
        if points is None or not self._is_written_raw(turns, roles) or not self._scales_read(turns, roles):
            return None
        if all(point.source in turns.raw for point in points):
            return None
        offsets = {name: nodes for name, nodes in roles.shifts.items() if turns.raw.isdisjoint(nodes)}
        images = [*roles.images, *((name, 0) for name, nodes in roles.shifts.items() if turns.raw.issuperset(nodes))]
        if len(offsets) + len(images) < len(roles.shifts) + len(roles.images):
            return None
        exact = frozenset(writer.weight for writer in roles.writers if self._is_of_inputs(writer))
        return Stream(group.key, group.size, roles, turns, points, exact, offsets, tuple(images), self.graph)

    def _is_read_behind_norms(self, turns: Turns, roles: Roles) -> bool:
        """Whether nothing but the linear maps learns more of the stream than the norms before them need."""
        readers = {linear_map.node for linear_map in roles.readers}
        readers |= set() if roles.tie is None else {roles.tie.node}
        for name in turns.axes:
            for user in self.nodes[name].users:
                if user.name in turns.axes or user.name in readers or not _is_used(user):
                    continue
                # What is computed of the stream itself may only serve its own norm.
                if name not in turns.raw or not self._serves_norms(user, turns):
                    return False
        return True

    def _serves_norms(self, node: fx.Node, turns: Turns) -> bool:
        if node.op == "output":
            return False
        return all(user.name in turns.axes or self._serves_norms(user, turns) for user in node.users)

    def _is_written_raw(self, turns: Turns, roles: Roles) -> bool:
        """Whether everything that is written is a part of the stream as it stands before norms."""
        for writer in roles.writers:
            places = [writer.output] if writer.added is None else [writer.output, *writer.added]
            if not turns.raw.issuperset(places):
                return False
        sums = [name for name in turns.axes if name not in turns.raw]
        return not any(_turned_inputs(self.nodes[name], turns) > 1 for name in sums)

    def _scales_read(self, turns: Turns, roles: Roles) -> bool:
        """Whether gains multiply what is read, and none what is written."""
        names = self.context.program.state_names
        gains = {name for parameter in roles.gains for name in self.names_of(parameter)}
        return not any(self._scales_raw(node, turns) for node, name in names.items() if name in gains)

    def _scales_raw(self, node: fx.Node, turns: Turns) -> bool:
        if node.name in turns.axes:
            return node.name in turns.raw
        return any(self._scales_raw(user, turns) for user in node.users)

    def _points(self, turns: Turns, roles: Roles) -> tuple[Point, ...] | None:
        readers: dict[str, list[LinearMap]] = {}
        for linear_map in roles.readers:
            readers.setdefault(linear_map.source, []).append(linear_map)
        if roles.tie is not None:
            if roles.tie.source in readers:
                return None
            readers[roles.tie.source] = []
        points = []
        for source, of_source in readers.items():
            rank = self.nodes[source].meta["val"].ndim
            path = self._path_to(source, turns)
            if path is None or turns.axes.get(source) != rank - 1:
                return None
            points.append(Point(source, path[0], tuple(of_source), tuple(path[1:])))
        order = {name: number for number, name in enumerate(self.nodes)}
        return tuple(sorted(points, key=lambda point: order[point.source]))

    def _path_to(self, source: str, turns: Turns) -> list[str] | None:
        """Returns the stream that is normalised to what stands at an operation, and what leads from it there."""
        path = [source]
        while path[0] not in turns.raw:
            turned = [node.name for node in self.nodes[path[0]].all_input_nodes if node.name in turns.axes]
            if len(turned) != 1:
                return None
            path.insert(0, turned[0])
        return path

    def _is_of_inputs(self, writer: LinearMap) -> bool:
        """Whether a map reads inputs of the network as they are, which no source computes otherwise."""
        slots = self.context.program.slots
        for node in ancestors(self.nodes[writer.source]):
            if node in slots and slots[node].kind == SlotKind.PARAMETER:
                return False
        free = self.graph.free_groups
        return not any(group in free for group, _ in stretches(self.graph, writer.weight, writer.input_axis) or ())


def ancestors(node: fx.Node, stops: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """Returns a node and all that it is computed from, as far as some others."""
    seen, waiting = set(stops), [node]
    reached = set[fx.Node]()
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            reached.add(current)
            waiting += current.all_input_nodes
    return reached


def _is_used(node: fx.Node) -> bool:
    """Whether anything reads an operation's result; a check of a type makes none."""
    return node.op == "output" or bool(node.users)


def _turned_inputs(node: fx.Node, turns: Turns) -> int:
    return sum(before.name in turns.axes for before in node.all_input_nodes)
