"""The graph IR: what of a model's parameters must be transported together.

A `ModelGraph` holds, for every parameter axis, an `AxisLayout` whose leaves name neuron groups, and for every
`NeuronGroup` the slots in which it stands. It is made once by `mergekit_ot.trace_model` and never changed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mergekit_ot.graph.axes.reasons import PinReason
from mergekit_ot.graph.deferred import Deferred, defer_fields
from mergekit_ot.graph.layouts import IN, AxisLayout, leaf_groups
from mergekit_ot.graph.mismatch import check_same_structure

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True)
class AxisSlot:
    """A place of a group: parameter, axis, path inside the axis' layout, and role.

    Role ``OUT`` owns the neurons (transport averages), role ``IN`` reads them (transport splits).
    """

    parameter: str
    axis: int
    path: tuple[int, ...]
    role: str

    @property
    def is_reader(self) -> bool:
        """Whether the parameter reads the neurons there, rather than making them."""
        return self.role == IN


@dataclass(frozen=True)
class NeuronGroup:
    """Neurons that share one order: every slot must be transported by the same coupling.

    Attributes:
        key: Its first member, ``parameter:axis`` with a path where the axis is composite; equal across widths.
        size: Number of neurons (per index of the context).
        members: The slots.
        context: Keys of the groups by which a family is indexed; the family has one order per index.
        pin: Why it may not be reordered, or None.
        flags: ``uniform marginals only``, ``size-sensitive``.
        first_operation: Number of the first operation that makes these neurons.

    Example:
        >>> import torch
        >>> from mergekit_ot import trace_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> group = trace_model(net, torch.randn(2, 4)).groups["0.weight:0"]
        >>> group.size, [(slot.parameter, slot.axis, slot.role) for slot in group.members]
        (8, [('0.weight', 0, 'OUT'), ('0.bias', 0, 'OUT'), ('2.weight', 1, 'IN')])
    """

    key: str
    size: int
    members: tuple[AxisSlot, ...]
    context: tuple[str, ...]
    pin: PinReason | None
    flags: frozenset[str]
    first_operation: int

    @property
    def is_free(self) -> bool:
        """Whether there is an order to choose."""
        return self.pin is None and self.size > 1

    @property
    def places(self) -> dict[tuple[str, int], AxisSlot]:
        """The axes on which the group stands: (parameter, axis) → its last slot there."""
        return {(slot.parameter, slot.axis): slot for slot in self.members}


@dataclass(frozen=True)
class Diagnostics:
    """What tracing noticed: each entry is a sentence for the user."""

    unknown_operations: tuple[str, ...] = ()
    rule_errors: tuple[str, ...] = ()
    unaccounted: tuple[str, ...] = ()
    unobserved: tuple[str, ...] = ()
    hidden_state: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def sentences(self) -> tuple[str, ...]:
        """All entries."""
        from_rules = (*self.unknown_operations, *self.rule_errors, *self.unaccounted)
        return (*self.remarks, *from_rules, *self.unobserved, *self.hidden_state)


@dataclass(frozen=True)
class ModelGraph:
    """The neuron groups of a model and where they stand.

    Attributes:
        operations: Operations, values and parameters of the captured program (``networkx.DiGraph``).
        layouts: Parameter or per-neuron buffer → one layout per axis.
        groups: Key → group, pinned ones included.
        roles: (parameter, axis, group key) → role.
        aliases: Further name of a tied parameter → the name under which it is described.
        diagnostics: What tracing noticed.
        buffers: Names in `layouts` that are buffers.
        values: Value name → one layout per axis, for the data that a parameter of the model reads.
        program: The captured program (`mergekit_ot.CapturedProgram`), to be run with any state. Of a graph from a cache
            it is captured when it is first asked for.

    Example:
        Who makes the six channels of a convolution, and who reads them, 16 columns each:

        >>> import torch
        >>> from torch import nn
        >>> from mergekit_ot import trace_model
        >>> from mergekit_ot.graph.layouts import layout_text
        >>> net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4 * 4, 2))
        >>> graph = trace_model(net, torch.randn(2, 3, 4, 4))
        >>> for slot in graph.free_groups["0.weight:0"].members:
        ...     print(slot.role, slot.parameter, layout_text(graph.layouts[slot.parameter][slot.axis]))
        OUT 0.weight 0.weight:0
        OUT 0.bias 0.weight:0
        IN 3.weight (0.weight:0 × 16!)
    """

    operations: nx.DiGraph
    layouts: Mapping[str, tuple[AxisLayout, ...]]
    groups: Mapping[str, NeuronGroup]
    roles: Mapping[tuple[str, int, str], str]
    aliases: Mapping[str, str]
    buffers: frozenset[str]
    diagnostics: Diagnostics
    values: Mapping[str, tuple[AxisLayout, ...]]
    program: Any = None

    @cached_property
    def free_groups(self) -> dict[str, NeuronGroup]:
        """The groups whose order may be chosen."""
        return {key: group for key, group in self.groups.items() if group.is_free}

    @cached_property
    def pinned_groups(self) -> dict[str, NeuronGroup]:
        """The groups whose order is fixed, each with its reason."""
        return {key: group for key, group in self.groups.items() if group.pin is not None}

    def outline(self) -> ModelGraph:
        """Returns the graph without its program and its operations: what stands where, small enough to be sent."""
        return replace(self, operations=Deferred(_no_operations), program=None)

    def pin_sentences(self) -> tuple[str, ...]:
        """Returns a sentence per reason of a pin: how many parameter axes, why, and where the first one is."""
        places: dict[str, dict[tuple[str, int], PinReason]] = {}
        for group in self.pinned_groups.values():
            if group.pin is not None and group.size > 1:
                for slot in group.members:
                    places.setdefault(group.pin.why, {})[slot.parameter, slot.axis] = group.pin
        sentences = []
        for pins in places.values():
            first = next(iter(pins.values()))
            sentences.append(f"{len(pins)} {'axis' if len(pins) == 1 else 'axes'}: {first}")
        return tuple(sentences)

    def family_size(self, key: str) -> int:
        """Returns how many independent orders a group has: one, or one per index of its context."""
        return math.prod(self.groups[outer].size for outer in self.groups[key].context)

    @cached_property
    def group_graph(self) -> nx.MultiDiGraph:
        """The graph of free groups: an edge per parameter that reads one and makes another."""
        import networkx as nx

        graph = nx.MultiDiGraph()
        for key, group in self.free_groups.items():
            graph.add_node(key, size=group.size, first=group.first_operation)
        for before, after, parameter in self.group_edges():
            graph.add_edge(before, after, parameter=parameter)
        return graph

    def group_edges(self) -> Iterator[tuple[str, str, str | None]]:
        """Yields the edges of `group_graph`: which free group lies behind which, and the parameter between them."""
        for parameter in self.layouts:
            for reader, maker in itertools.product(*self._readers_and_makers(parameter)):
                yield reader, maker, parameter
        for key, group in self.free_groups.items():
            for outer in group.context:
                if outer in self.free_groups:
                    yield outer, key, None

    def _readers_and_makers(self, parameter: str) -> tuple[list[str], list[str]]:
        """Returns the free groups that a parameter reads, and those that it makes."""
        readers, makers = set[str](), set[str]()
        for axis, layout in enumerate(self.layouts[parameter]):
            for key in leaf_groups(layout):
                if key in self.free_groups:
                    (readers if self.roles[parameter, axis, key] == IN else makers).add(key)
        return sorted(readers), sorted(makers)

    def check_same_structure(self, other: ModelGraph, mine: str, theirs: str, kept: Collection[str] = ()) -> None:
        """Checks that `other` differs from this graph by the sizes of free groups only.

        Args:
            other: Another graph.
            mine: Name of the network of this graph, for the message.
            theirs: Name of the other.
            kept: Parameters that come from one network as they are: their axes that stay in place may differ.

        Raises:
            GraphMismatchError: Names the first parameter that differs.
        """
        if self is not other:
            check_same_structure(self, other, mine, theirs, kept)


def _no_operations() -> nx.DiGraph:
    import networkx as nx

    return nx.DiGraph()


# Of a graph that was read from a file they are made when they are first asked for.
defer_fields(ModelGraph, "operations", "program")
