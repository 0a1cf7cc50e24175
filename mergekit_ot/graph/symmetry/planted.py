"""Proof by planted elements: random elements of a symmetry keep the function, a part of one alone changes it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import cached_property

from torch import nn

from mergekit_ot.graph.capture.inputs import of_few_samples
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.layouts import AxisLayout, Choice, Fixed, Neurons
from mergekit_ot.graph.normal_form.find import find_normal_form
from mergekit_ot.graph.normal_form.form import NormalForm
from mergekit_ot.graph.symmetry.proof import Comparison, Proof
from mergekit_ot.graph.symmetry.symmetry import AbstractProof, AbstractSymmetry, Places
from mergekit_ot.graph.symmetry.transformation import Transformation


class PlantedProof(AbstractProof):
    """Proves groups one by one, at two draws of weights and inputs, which are made when they are first needed.

    Args:
        make: Gives a fresh instance each time.
        inputs: Inputs of the shapes that the model takes.
        seed: Seed of the random weights, inputs and elements.
        graph: The model's graph, in which a normal form is looked for; there is none where it is left out.
        form: The normal form in which states are, where it is known.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        inputs: tuple[object, ...],
        seed: int = 0,
        graph: ModelGraph | None = None,
        form: NormalForm | None = None,
    ) -> None:
        self._make, self._inputs, self._seed, self._graph, self._form = make, inputs, seed, graph, form
        self._few = of_few_samples(inputs)
        self._known: dict[tuple[object, ...], bool] = {}

    @cached_property
    def _draws(self) -> tuple[Proof, ...]:
        # A model may be made for batches of one size.
        for inputs in (self._few, self._inputs):
            try:
                proof = Proof(self._make, inputs, self._seed)
                return proof, proof.again()
            except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
                continue
        # A model that cannot run on random weights in float64 proves nothing, which loses freedom and harms nothing.
        return ()

    @property
    def _proving_inputs(self) -> tuple[object, ...]:
        return self._draws[0].inputs if self._draws else self._few

    @cached_property
    def normal_form(self) -> NormalForm:
        """The normal form of the model's states, found when it is first asked for."""
        if self._form is not None:
            return self._form
        if self._graph is None:
            return super().normal_form
        return find_normal_form(self._graph, self._make, self._proving_inputs, self._seed)

    @property
    def known_refusals(self) -> tuple[str, ...]:
        """Why the normal form leaves out some gains and biases, where it was looked for; a sentence each."""
        form = vars(self).get("normal_form")
        return () if form is None else tuple(f"'{each.parameter}': {each.reason}" for each in form.refusals)

    @cached_property
    def _normal_draws(self) -> tuple[Proof, ...]:
        """The draws with their states in normal form."""
        if not self.normal_form.rewrites:
            return self._draws
        return tuple(draw.of(self.normal_form.of_state(draw.state)) for draw in self._draws)

    def draws_of(self, symmetry: AbstractSymmetry) -> tuple[Proof, ...]:
        """Returns the draws at which a symmetry may hold."""
        return self._normal_draws if symmetry.in_normal_form else self._draws

    def is_proven(self, symmetry: AbstractSymmetry, graph: ModelGraph, key: str, places: Places) -> bool:
        """Whether random elements at these places keep the function, and at the readers alone change it."""
        question = _question(symmetry, key, places)
        if question not in self._known:
            guess = {key: places}
            self._known[question] = self._holds(symmetry, graph, guess) and self._can_fail(symmetry, graph, guess)
        return self._known[question]

    def proven(self, symmetry: AbstractSymmetry, graph: ModelGraph, guesses: Mapping[str, Places]) -> dict[str, Places]:
        """Returns the groups at which a guess is proven; where all hold together, none is run alone for that."""
        asked = {key: places for key, places in guesses.items() if _question(symmetry, key, places) not in self._known}
        if len(asked) > 1 and self._holds(symmetry, graph, asked):
            for key, places in asked.items():
                self._known[_question(symmetry, key, places)] = self._can_fail(symmetry, graph, {key: places})
        return super().proven(symmetry, graph, guesses)

    def _holds(self, symmetry: AbstractSymmetry, graph: ModelGraph, places: Mapping[str, Places]) -> bool:
        draws = self.draws_of(symmetry)
        return bool(draws) and all(planted_change(draw, symmetry, graph, places) <= draw.tolerance for draw in draws)

    def _can_fail(self, symmetry: AbstractSymmetry, graph: ModelGraph, places: Mapping[str, Places]) -> bool:
        """Whether an element at a part of the places alone changes the function: dead neurons prove nothing."""
        part = {key: _part(graph, key, where, symmetry.in_normal_form) for key, where in places.items()}
        draws = self.draws_of(symmetry)
        if part == dict(places):
            # All stand in one weight (that of queries and keys): one place there is a part.
            return any(is_sensitive(draw, symmetry, graph, key, places[key]) for draw in draws for key in places)
        return any(planted_change(draw, symmetry, graph, part) > draw.threshold for draw in draws)


def _question(symmetry: AbstractSymmetry, key: str, places: Places) -> tuple[object, ...]:
    return (symmetry.name, key, *sorted(places.items()))


def _part(graph: ModelGraph, key: str, places: Places, is_directed: bool) -> Places:
    """Returns the places that read neurons; where none does (those of queries and keys), the places of one maker.

    Args:
        graph: The model's graph.
        key: The group.
        places: Where elements act.
        is_directed: Whether neurons without readers count at all: not where only their signs are asked for.
    """
    slots = graph.groups[key].places
    readers = {place: powers for place, powers in places.items() if slots[place].is_reader}
    if readers or not is_directed:
        return readers
    acting = [place for place, powers in places.items() if any(powers)]
    return {place: powers for place, powers in places.items() if place[0] == acting[0][0]} if acting else {}


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
