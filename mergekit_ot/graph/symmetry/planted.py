"""Proof by planted elements: random elements of a symmetry keep the function, a part of one alone changes it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import cached_property

from torch import nn

from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.layouts import AxisLayout, Choice, Fixed, Neurons
from mergekit_ot.graph.symmetry.proof import Comparison, Proof
from mergekit_ot.graph.symmetry.symmetry import AbstractProof, AbstractSymmetry, Places
from mergekit_ot.graph.symmetry.transformation import Transformation


class PlantedProof(AbstractProof):
    """Proves groups one by one, at two draws of weights and inputs, which are made when they are first needed.

    Args:
        make: Gives a fresh instance each time.
        inputs: Inputs of the shapes that the model takes.
        seed: Seed of the random weights, inputs and elements.
    """

    def __init__(self, make: Callable[[], nn.Module], inputs: tuple[object, ...], seed: int = 0) -> None:
        self._make, self._inputs, self._seed = make, inputs, seed
        self._known: dict[tuple[object, ...], bool] = {}

    @cached_property
    def _draws(self) -> tuple[Proof, ...]:
        try:
            proof = Proof(self._make, self._inputs, self._seed)
            return proof, proof.again()
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
            # A model that cannot run on random weights in float64 proves nothing, which loses freedom and harms
            # nothing.
            return ()

    def is_proven(self, symmetry: AbstractSymmetry, graph: ModelGraph, key: str, places: Places) -> bool:
        """Whether random elements at these places keep the function, and at the readers alone change it."""
        question = (symmetry.name, key, *sorted(places.items()))
        if question not in self._known:
            self._known[question] = self._holds(symmetry, graph, {key: places}) and self._can_fail(
                symmetry, graph, {key: places}
            )
        return self._known[question]

    def _holds(self, symmetry: AbstractSymmetry, graph: ModelGraph, places: Mapping[str, Places]) -> bool:
        changes = (planted_change(draw, symmetry, graph, places) for draw in self._draws)
        pairs = zip(changes, self._draws, strict=True)
        return bool(self._draws) and all(change <= draw.tolerance for change, draw in pairs)

    def _can_fail(self, symmetry: AbstractSymmetry, graph: ModelGraph, places: Mapping[str, Places]) -> bool:
        """Whether an element at the readers alone changes the function: dead neurons prove nothing."""
        readers = {key: _readers(graph, key, where) for key, where in places.items()}
        return any(planted_change(draw, symmetry, graph, readers) > draw.threshold for draw in self._draws)


def _readers(graph: ModelGraph, key: str, places: Places) -> Places:
    slots = graph.groups[key].places
    return {place: powers for place, powers in places.items() if slots[place].is_reader}


def find_proven(symmetry: AbstractSymmetry, graph: ModelGraph, proof: AbstractProof) -> dict[str, Places]:
    """Returns where a model has a symmetry: what it finds, less what the proof refuses.

    What the trace itself claims is not asked for one by one: `mergeot check` proves it for all groups together.
    """
    found = symmetry.find(graph, proof)
    if symmetry.is_traced:
        return dict(found)
    return {key: places for key, places in found.items() if proof.is_proven(symmetry, graph, key, places)}


def planted_change(
    proof: Comparison,
    symmetry: AbstractSymmetry,
    graph: ModelGraph,
    places: Mapping[str, Places],
    only: Collection[str] | None = None,
) -> float:
    """Returns the largest relative change of the output when random elements are planted.

    Args:
        proof: The runs to compare with; its generator draws the elements.
        symmetry: Whose elements are planted.
        graph: The model's graph.
        places: The groups, and where an element acts.
        only: The groups that get their element; all of them where left out.
    """
    planted = Transformation.random(symmetry, graph, places, proof.generator)
    return proof.change((planted if only is None else planted.only(only)).of_state(proof.state))


def planted_error(
    proof: Comparison, symmetry: AbstractSymmetry, graph: ModelGraph, places: Mapping[str, Places], trials: int = 1
) -> float | None:
    """Returns the largest relative change of the output over several trials; None where there is no group."""
    if not places:
        return None
    return max(planted_change(proof, symmetry, graph, places) for _ in range(trials))


def find_culprits(
    proof: Comparison, symmetry: AbstractSymmetry, graph: ModelGraph, places: Mapping[str, Places]
) -> list[str]:
    """Returns the groups that change the function on their own, or, where only a mixture does, all of them."""
    alone = [key for key in places if planted_change(proof, symmetry, graph, places, [key]) > proof.tolerance]
    return alone or list(places)


def is_sensitive(proof: Proof, symmetry: AbstractSymmetry, graph: ModelGraph, key: str, places: Places) -> bool:
    """Whether an element at one place of the group, without the others, changes the output by more than the noise.

    A place is one in one axis of one parameter: query and key neurons that share a fused weight stand at two.
    """
    planted = Transformation.random(symmetry, graph, {key: places}, proof.generator)
    for name in dict.fromkeys(parameter for parameter, _ in places):
        for layouts in one_place_each(graph.layouts[name], key):
            alone = dict(proof.state)
            alone[name] = planted.of_tensor(proof.state[name], name, layouts)
            for alias, described in graph.aliases.items():
                if described == name and alias in alone:
                    alone[alias] = alone[name]
            if proof.change(alone) > proof.threshold:
                return True
    return False


def one_place_each(layouts: tuple[AxisLayout, ...], key: str) -> list[tuple[AxisLayout, ...]]:
    """Returns the layouts once per place of a group, with all its other places fixed."""
    count = sum(layout_places(layout, key) for layout in layouts)
    alone = []
    for kept in range(count):
        numbers = itertools.count()
        alone.append(tuple(_with_one_place(layout, key, kept, numbers) for layout in layouts))
    return alone


def layout_places(layout: AxisLayout, key: str) -> int:
    """Returns how often a group stands in a layout."""
    if isinstance(layout, Neurons | Fixed):
        return int(isinstance(layout, Neurons) and layout.group == key)
    return sum(layout_places(part, key) for part in (layout.options if isinstance(layout, Choice) else layout.parts))


def _with_one_place(layout: AxisLayout, key: str, kept: int, numbers: Iterator[int]) -> AxisLayout:
    if isinstance(layout, Neurons):
        return Fixed(layout.size) if layout.group == key and next(numbers) != kept else layout
    if isinstance(layout, Fixed):
        return layout
    if isinstance(layout, Choice):
        return replace(layout, options=tuple(_with_one_place(o, key, kept, numbers) for o in layout.options))
    return replace(layout, parts=tuple(_with_one_place(p, key, kept, numbers) for p in layout.parts))
