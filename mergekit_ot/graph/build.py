"""Turns the labels of a propagated program into a frozen `ModelGraph`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx

from mergekit_ot.graph.axes.expressions import (
    Atom,
    Case,
    Concat,
    Expression,
    PinReason,
    Product,
    Replicated,
    Tag,
    atoms_of,
    pieces,
    resolve,
)
from mergekit_ot.graph.ir import AxisSlot, Diagnostics, ModelGraph, NeuronGroup
from mergekit_ot.graph.layouts import IN, OUT, AxisLayout, Blocks, Choice, Factors, Fixed, Neurons
from mergekit_ot.graph.propagate import Labelled

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
        self.keys: dict[Atom, str] = {}
        self.numbers: dict[Tag, int] = {}
        self.places: dict[Atom, list[_Place]] = {}
        self.indexing: set[Atom] = set()

    def build(self, operations: nx.DiGraph, program: Any = None) -> ModelGraph:
        """Returns the graph."""
        self._pin_unobserved()
        self._collect_places()
        self._name_groups()
        self.indexing = {a for atom in self.places for c in atom.context for a in atoms_of(resolve(c))}
        found = self.labelled
        layouts = {name: tuple(self._layout(resolve(x)) for x in labels) for name, labels in found.parameters.items()}
        groups = {self.keys[atom]: self._group(atom) for atom in self.places}
        roles = {(p.parameter, p.axis, self.keys[atom]): p.role for atom, ps in self.places.items() for p in ps}
        diagnostics = Diagnostics(
            tuple(found.unknown.values()), tuple(found.rule_errors), tuple(found.unaccounted),
            tuple(self.unobserved), self.hidden_state, self.remarks,
        )  # fmt: skip
        ordered = dict(sorted(groups.items(), key=lambda item: (item[1].first_operation, item[0])))
        return ModelGraph(
            operations, layouts, ordered, roles, self.aliases, frozenset(found.buffers), diagnostics,
            self._observable(), program,
        )  # fmt: skip

    def _tie_tails(self, seen: set[Atom]) -> None:
        """Lets rows that this input shape did not reach (the tail of a table) follow the rows that it did."""
        algebra = self.labelled.algebra
        for labels in self.labelled.parameters.values():
            for label in labels:
                expression = resolve(label)
                if isinstance(expression, Case):
                    reached = [option for option in expression.options if atoms_of(option) & seen]
                    for option in expression.options:
                        if reached and not atoms_of(option) & seen:
                            algebra.unify(reached[0], option)
        algebra.settle([])

    def _pin_unobserved(self) -> None:
        self._tie_tails({a for atom in self.labelled.observed for a in atoms_of(resolve(atom))})
        seen = {a for atom in self.labelled.observed for a in atoms_of(resolve(atom))}
        for name, labels in self.labelled.parameters.items():
            used = name in self.labelled.first_use
            for axis, label in enumerate(labels):
                blind = {a for a in atoms_of(label) if a.pin is None and a.size > 1} - seen
                if not blind:
                    continue
                why = "this parameter is not used" if not used else "these entries are not used at this input shape"
                self.unobserved.append(f"Axis {axis} of '{name}' is pinned: {why}.")
                for atom in blind:
                    self.labelled.algebra.atoms.pin_atom(atom, PinReason(why, "", name))

    def _collect_places(self) -> None:
        reading: dict[tuple[str, int | None], set[Atom]] = {}
        for parameter, axis, expression in self.labelled.reads:
            reading.setdefault((parameter, axis), set()).update(atoms_of(expression))
        for name, labels in self.labelled.parameters.items():
            for axis, label in enumerate(labels):
                atoms_in = reading.get((name, axis), set()) | reading.get((name, None), set())
                for atom, path in _paths(resolve(label), ()):
                    role = IN if atom in atoms_in else OUT
                    self.places.setdefault(atom, []).append(_Place(name, axis, path, role))

    def _name_groups(self) -> None:
        order = {name: index for index, name in enumerate(self.labelled.parameters)}
        taken: dict[str, Atom] = {}
        for atom, places in self.places.items():
            first = min(places, key=lambda p: (p.role != OUT, order[p.parameter], p.axis, p.path))
            key = f"{first.parameter}:{first.axis}" + "".join(f".{step}" for step in first.path)
            self.keys[atom] = key
            taken[key] = atom

    def _group(self, atom: Atom) -> NeuronGroup:
        places = self.places[atom]
        members = tuple(AxisSlot(p.parameter, p.axis, p.path, p.role) for p in places)
        makers = [p.parameter for p in places if p.role == OUT] or [p.parameter for p in places]
        first = min(self.labelled.first_use.get(name, _UNSEEN) for name in makers)
        context = {a for c in atom.context for a in atoms_of(resolve(c)) if a in self.keys}
        names = tuple(sorted((self.keys[a] for a in context), key=lambda key: key))
        pin = atom.pin
        if pin is None and len(context) != len({a for c in atom.context for a in atoms_of(resolve(c)) if a.size > 1}):
            pin = PinReason("its family is indexed by neurons that no parameter holds")
        return NeuronGroup(self.keys[atom], atom.size, members, names, pin, frozenset(atom.flags), first)

    def _layout(self, expression: Expression) -> AxisLayout:
        if isinstance(expression, Atom):
            is_held = expression in self.keys and (expression.pin is None or expression in self.indexing)
            return Neurons(self.keys[expression], expression.size) if is_held else Fixed(expression.size)
        if isinstance(expression, Replicated):
            return Fixed(expression.size)
        if isinstance(expression, Product):
            parts: list[AxisLayout] = []
            for part in (self._layout(part) for part in expression.factors):
                if parts and isinstance(parts[-1], Fixed) and isinstance(part, Fixed):
                    parts[-1] = Fixed(parts[-1].size * part.size)
                else:
                    parts.append(part)
            return parts[0] if len(parts) == 1 else Factors(tuple(parts))
        number = self.numbers.setdefault(expression.tag.root(), len(self.numbers))
        if isinstance(expression, Concat):
            return Blocks(number, tuple(self._layout(part) for part in expression.blocks))
        options = tuple(self._layout(option) for option in expression.options)
        is_fixed = all(isinstance(option, Fixed) for option in options)
        return options[0] if is_fixed else Choice(number, options)

    def _observable(self) -> dict[str, tuple[AxisLayout, ...]]:
        """The data that parameters read, as far as a free group stands in them."""
        found = {}
        for name in self.labelled.read_values:
            resolved = [resolve(label) for label in self.labelled.values.get(name, [])]
            if any(atom.pin is None and atom in self.keys for label in resolved for atom in atoms_of(label)):
                found[name] = tuple(self._layout(label) for label in resolved)
        return found


def _paths(expression: Expression, path: tuple[int, ...]) -> list[tuple[Atom, tuple[int, ...]]]:
    if isinstance(expression, Atom):
        return [(expression, path)]
    paths: list[tuple[Atom, tuple[int, ...]]] = []
    for step, piece in enumerate(pieces(expression)):
        paths += _paths(piece, (*path, step))
    return paths
