"""Turns the labels of a propagated program into a frozen `ModelGraph`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit_ot.graph.axes import expressions
from mergekit_ot.graph.ir import AxisSlot, Diagnostics, ModelGraph, NeuronGroup
from mergekit_ot.graph.layouts import IN, OUT, AxisLayout, Blocks, Choice, Fixed, Neurons, product_layout
from mergekit_ot.graph.propagate import Labelled

if TYPE_CHECKING:
    import networkx as nx

_UNSEEN = 1 << 30


@dataclass
class _Place:
    parameter: str
    axis: int
    path: tuple[int, ...]
    role: str


class GraphBuilder:
    """Names the groups, collects their members and roles, pins what was never observed.

    Args:
        labelled: What propagation found.
        aliases: Further name of a tied parameter → first name.
        hidden_state: Sentences on tensors that the module keeps outside its state.
        remarks: Sentences on how the module was captured.
    """

    def __init__(
        self,
        labelled: Labelled,
        aliases: Mapping[str, str],
        hidden_state: tuple[str, ...],
        remarks: tuple[str, ...] = (),
    ) -> None:
        self.labelled = labelled
        self.aliases = dict(aliases)
        self.hidden_state = hidden_state
        self.remarks = remarks
        self.unobserved: list[str] = []
        self.keys: dict[expressions.Atom, str] = {}
        self.numbers: dict[expressions.Tag, int] = {}
        self.places: dict[expressions.Atom, list[_Place]] = {}
        self.indexing: set[expressions.Atom] = set()

    def build(self, operations: nx.DiGraph, program: Any = None) -> ModelGraph:
        """Returns the graph."""
        self._pin_unobserved()
        self._collect_places()
        self._pin_unlearned()
        self._name_groups()
        for atom in self.places:
            self.indexing |= expressions.standing_for(atom.context)
        layouts = {name: self._layouts(labels) for name, labels in self.labelled.parameters.items()}
        groups = {self.keys[atom]: self._group(atom) for atom in self.places}
        return ModelGraph(
            operations=operations,
            layouts=layouts,
            groups=dict(sorted(groups.items(), key=lambda item: (item[1].first_operation, item[0]))),
            roles=self._roles(),
            aliases=self.aliases,
            buffers=frozenset(self.labelled.buffers),
            diagnostics=self._diagnostics(),
            values=self._observable(),
            program=program,
        )

    def _roles(self) -> dict[tuple[str, int, str], str]:
        roles: dict[tuple[str, int, str], str] = {}
        for atom, places in self.places.items():
            for place in places:
                roles[place.parameter, place.axis, self.keys[atom]] = place.role
        return roles

    def _diagnostics(self) -> Diagnostics:
        return Diagnostics(
            unknown_operations=tuple(self.labelled.unknown.values()),
            rule_errors=tuple(self.labelled.rule_errors),
            unaccounted=tuple(self.labelled.unaccounted),
            unobserved=tuple(self.unobserved),
            hidden_state=self.hidden_state,
            remarks=self.remarks,
        )

    def _tie_tails(self, seen: set[expressions.Atom]) -> None:
        """Lets rows that this input shape did not reach (the tail of a table) follow the rows that it did."""
        algebra = self.labelled.algebra
        for label in itertools.chain(*self.labelled.parameters.values()):
            expression = expressions.resolve(label)
            if not isinstance(expression, expressions.Case):
                continue
            reached = [option for option in expression.options if expressions.atoms_of(option) & seen]
            for option in expression.options:
                if reached and not expressions.atoms_of(option) & seen:
                    algebra.unify(reached[0], option)
        algebra.settle([])

    def _pin_unobserved(self) -> None:
        self._tie_tails(expressions.standing_for(self.labelled.observed))
        seen = expressions.standing_for(self.labelled.observed)
        for name, labels in self.labelled.parameters.items():
            why = "these entries are not used at this input shape"
            if name not in self.labelled.first_use:
                why = "forward does not read this parameter at evaluation"
            for axis, label in enumerate(labels):
                blind = expressions.movable(label) - seen
                if blind and name not in self.labelled.buffers:
                    self.unobserved.append(f"Axis {axis} of '{name}' is pinned: {why}.")
                for atom in blind:
                    self.labelled.algebra.atoms.pin_atom(atom, expressions.PinReason(why, "", name))

    def _collect_places(self) -> None:
        reading: dict[tuple[str, int | None], set[expressions.Atom]] = {}
        for parameter, axis, expression in self.labelled.reads:
            reading.setdefault((parameter, axis), set()).update(expressions.atoms_of(expression))
        for name, labels in self.labelled.parameters.items():
            for axis, label in enumerate(labels):
                atoms_in = reading.get((name, axis), set()) | reading.get((name, None), set())
                for atom, path in _paths(expressions.resolve(label), ()):
                    role = IN if atom in atoms_in else OUT
                    self.places.setdefault(atom, []).append(_Place(name, axis, path, role))

    def _pin_unlearned(self) -> None:
        """Pins neurons that only buffers make: fixed filters and tables, which all sources have in one order."""
        buffers = self.labelled.buffers
        for atom, places in self.places.items():
            makers = [place.parameter for place in places if place.role == OUT]
            if makers and buffers.issuperset(makers):
                why = f"only buffer '{makers[0]}' makes these neurons"
                self.labelled.algebra.atoms.pin_atom(atom, expressions.PinReason(why, "", makers[0]))

    def _name_groups(self) -> None:
        order = {name: index for index, name in enumerate(self.labelled.parameters)}
        for atom, places in self.places.items():
            first = min(places, key=lambda p: (p.role != OUT, order[p.parameter], p.axis, p.path))
            self.keys[atom] = f"{first.parameter}:{first.axis}" + "".join(f".{step}" for step in first.path)

    def _group(self, atom: expressions.Atom) -> NeuronGroup:
        places = self.places[atom]
        indexed_by = expressions.standing_for(atom.context)
        context = {outer for outer in indexed_by if outer in self.keys}
        pin = atom.pin
        if pin is None and len(context) != sum(outer.size > 1 for outer in indexed_by):
            pin = expressions.PinReason("its family is indexed by neurons that no parameter holds")
        return NeuronGroup(
            key=self.keys[atom],
            size=atom.size,
            members=tuple(AxisSlot(place.parameter, place.axis, place.path, place.role) for place in places),
            context=tuple(sorted(self.keys[outer] for outer in context)),
            pin=pin,
            flags=frozenset(atom.flags),
            first_operation=self._first_operation(places),
        )

    def _first_operation(self, places: Sequence[_Place]) -> int:
        """Returns the number of the first operation that uses a parameter which makes the neurons."""
        makers = [place for place in places if place.role == OUT]
        return min(self.labelled.first_use.get(place.parameter, _UNSEEN) for place in makers or places)

    def _layouts(self, labels: Sequence[expressions.Expression]) -> tuple[AxisLayout, ...]:
        return tuple(self._layout(expressions.resolve(label)) for label in labels)

    def _layout(self, expression: expressions.Expression) -> AxisLayout:
        if isinstance(expression, expressions.Atom):
            return self._atom_layout(expression)
        if isinstance(expression, expressions.Replicated):
            return Fixed(expression.size)
        if isinstance(expression, expressions.Product):
            return product_layout([self._layout(factor) for factor in expression.factors])
        number = self.numbers.setdefault(expression.tag.root(), len(self.numbers))
        inner = tuple(self._layout(piece) for piece in expressions.pieces(expression))
        if isinstance(expression, expressions.Concat):
            return Blocks(number, inner)
        is_fixed = all(isinstance(option, Fixed) for option in inner)
        return inner[0] if is_fixed else Choice(number, inner)

    def _atom_layout(self, atom: expressions.Atom) -> AxisLayout:
        """A pinned atom is named only where a family is indexed by it."""
        is_named = atom in self.keys and (atom.pin is None or atom in self.indexing)
        return Neurons(self.keys[atom], atom.size) if is_named else Fixed(atom.size)

    def _observable(self) -> dict[str, tuple[AxisLayout, ...]]:
        """The data that parameters read, as far as a free group stands in them."""
        observable: dict[str, tuple[AxisLayout, ...]] = {}
        for name in self.labelled.read_values:
            labels = self.labelled.values.get(name, [])
            if any(atom.pin is None and atom in self.keys for atom in expressions.standing_for(labels)):
                observable[name] = self._layouts(labels)
        return observable


def _paths(expression: expressions.Expression, path: tuple[int, ...]) -> list[tuple[expressions.Atom, tuple[int, ...]]]:
    if isinstance(expression, expressions.Atom):
        return [(expression, path)]
    paths: list[tuple[expressions.Atom, tuple[int, ...]]] = []
    for step, piece in enumerate(expressions.pieces(expression)):
        paths += _paths(piece, (*path, step))
    return paths
