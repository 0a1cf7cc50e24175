"""Networks in their normal forms: what a solver that rotates neurons aligns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import final

from torch import nn

from mergekit_ot.fusion.architecture import KnownArchitecture
from mergekit_ot.fusion.normal_states import NormalStates
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.fusion.tracing import TracedModels
from mergekit_ot.fusion.tying import tying_fold
from mergekit_ot.graph.capture.inputs import of_few_samples
from mergekit_ot.graph.capture.untying import untied
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.normal_form.find import find_normal_form
from mergekit_ot.graph.normal_form.form import NormalForm
from mergekit_ot.graph.symmetry.held import held_symmetries
from mergekit_ot.graph.symmetry.rotary import with_rotary_groups
from mergekit_ot.graph.symmetry.rotations import may_rotate
from mergekit_ot.graph.symmetry.symmetry import AbstractSymmetry

Trace = Callable[[nn.Module], ModelGraph]


def in_normal_form(models: TracedModels, inputs: tuple[object, ...], trace: Trace, may_rewrite: bool) -> TracedModels:
    """Returns the networks with their states in normal form, and with names for the planes that positions turn.

    Where an embedding is also the head that reads a norm, the two are made separate parameters, so that the norm's gain
    can go into the head.

    Args:
        models: The networks, traced.
        inputs: What they were traced with.
        trace: Gives the graph of a fresh module.
        may_rewrite: Whether states may be rewritten at all; otherwise only the names are given.
    """
    target, graph, inputs = models.target, models.target_graph, of_few_samples(inputs)
    if not may_rotate(graph):
        return models
    form = find_normal_form(graph, target.make, inputs) if may_rewrite else NormalForm()
    aliases: dict[str, str] = {}
    if may_rewrite and graph.aliases:
        make = untied(target.make, graph.aliases)
        form_apart = find_normal_form(trace(make()), make, inputs)
        if _is_worth_untying(form, form_apart, graph.aliases):
            form, aliases = form_apart, dict(graph.aliases)
    states = NormalStates(form, aliases)
    known = _Known(states, trace, graph, inputs)
    sources = tuple(known.source(*pair) for pair in zip(models.sources, models.graphs, strict=True))
    graphs = tuple(known.graph(*pair) for pair in zip(models.sources, models.graphs, strict=True))
    return replace(
        models,
        sources=sources if states.is_telling else models.sources,
        graphs=graphs,
        target=known.source(target, graph) if states.is_telling else target,
        target_graph=known.graph(target, graph),
        normal=states if states.is_telling else None,
        originals=models.sources,
        rules=models.rules.untied(aliases),
        uncompared=models.uncompared | {alias for alias, name in aliases.items() if name in models.uncompared},
    )


def told_of_ties(
    make: Callable[[], nn.Module],
    graph: ModelGraph,
    inputs: tuple[object, ...],
    trace: Trace,
    symmetries: Sequence[AbstractSymmetry],
) -> tuple[str, ...]:
    """Returns sentences on what more may be done to streams where a fusion makes tied weights separate for that.

    Args:
        make: Gives a fresh instance each time.
        graph: The graph of one of them.
        inputs: What it was traced with.
        trace: Gives the graph of a fresh module.
        symmetries: What may be done to neurons.
    """
    if not graph.aliases or not may_rotate(graph):
        return ()
    inputs, make_apart = of_few_samples(inputs), untied(make, graph.aliases)
    apart = trace(make_apart())
    form = find_normal_form(apart, make_apart, inputs)
    if not _is_worth_untying(find_normal_form(graph, make, inputs), form, graph.aliases):
        return ()
    held = held_symmetries(make_apart, apart, inputs, symmetries)
    return tuple(
        f"{', '.join(map(repr, graph.aliases))} is made a tensor of its own for an alignment with rotations: group "
        f"'{key}' is then {' and '.join(names)}. Afterwards fuse ties it again, unless --untie is given."
        for key, names in held.items()
        if key in form.neutral
    )


def _is_worth_untying(form: NormalForm, apart: NormalForm, aliases: Mapping[str, str]) -> bool:
    """Whether more is neutral once the weights are apart, and each head can be tied again by the norm before it."""
    gained = {name for names in apart.neutral.values() for name in names}
    gained -= {name for names in form.neutral.values() for name in names}
    states = NormalStates(apart, aliases)
    return bool(gained) and all(tying_fold(states, alias) is not None for alias in aliases)


@final
class _Known:
    """Networks in normal form; those that shared an architecture or a graph share the new one.

    Args:
        states: How states of the fused model's sizes are rewritten.
        trace: Gives the graph of a fresh module.
        like: The fused model's graph.
        inputs: What the networks were traced with.
    """

    def __init__(self, states: NormalStates, trace: Trace, like: ModelGraph, inputs: tuple[object, ...]) -> None:
        self.states, self.trace, self.inputs = states, trace, inputs
        self.sizes = _sizes(like)
        self.others: dict[int, NormalStates] = {}
        self.architectures: dict[int, KnownArchitecture] = {}
        self.graphs: dict[int, ModelGraph] = {}

    def source(self, source: SourceModel, graph: ModelGraph) -> SourceModel:
        """Returns a network with its state in normal form."""
        return SourceModel(source.name, self._architecture(source), self._states(source, graph).store(source.state))

    def _states(self, source: SourceModel, graph: ModelGraph) -> NormalStates:
        """Returns how a network's states are rewritten: which neurons a bias moves to depends on their numbers."""
        if not self.states.is_telling or _sizes(graph) == self.sizes:
            return self.states
        if id(graph) not in self.others:
            aliases = self.states.aliases
            make = untied(source.make, aliases) if aliases else source.make
            form = find_normal_form(self.graph(source, graph), make, self.inputs)
            self.others[id(graph)] = NormalStates(form, aliases)
        return self.others[id(graph)]

    def graph(self, source: SourceModel, graph: ModelGraph) -> ModelGraph:
        """Returns the graph of a network in normal form."""
        if id(graph) not in self.graphs:
            found = self.trace(self._architecture(source)()) if self.states.aliases else graph
            self.graphs[id(graph)] = with_rotary_groups(found)
        return self.graphs[id(graph)]

    def _architecture(self, source: SourceModel) -> KnownArchitecture:
        if not self.states.aliases:
            return source.architecture
        known = source.architecture
        if id(known) not in self.architectures:
            self.architectures[id(known)] = KnownArchitecture(untied(known.built, self.states.aliases))
        return self.architectures[id(known)]


def _sizes(graph: ModelGraph) -> dict[str, int]:
    return {key: group.size for key, group in graph.groups.items()}
