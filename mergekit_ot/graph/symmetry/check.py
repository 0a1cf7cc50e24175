"""The check of a model: random elements of every symmetry on all its groups; the function must stay.

What would let the test lie is excluded: the model is never run before it is captured, every forward runs on a fresh
instance, parameters and buffers are randomised first (fresh norms are blind to order), and a group counts as
certified only if moving one of its members alone changes the output by far more than the model's own noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.layouts import layout_size, leaf_groups
from mergekit_ot.graph.normal_form.form import NormalForm
from mergekit_ot.graph.pinning import pinned, with_families
from mergekit_ot.graph.symmetry.cases import OtherCase, other_cases, recorded_sentence
from mergekit_ot.graph.symmetry.planted import (
    PlantedProof,
    find_culprits,
    find_proven,
    is_sensitive,
    planted_error,
)
from mergekit_ot.graph.symmetry.proof import Comparison, Proof
from mergekit_ot.graph.symmetry.rotary import with_rotary_groups
from mergekit_ot.graph.symmetry.symmetry import AbstractSymmetry, Places


@dataclass(frozen=True)
class CheckReport:
    """What a check found.

    Attributes:
        groups: Number of free groups.
        families: Number of independent orders (a family counts once per index of its context).
        certified: Free groups whose test can fail: moving one member alone changes the output.
        pinned: Number of parameter axes that stay in place as a whole.
        max_error: Largest change of the output over random orders of all groups, relative to the output's scale.
        preserved: Whether the function stays; None where no group is free (nothing was tested).
        rows: One record per group for a table.
        pins: A sentence per pin reason.
        culprits: Groups that had to be pinned because the function changed with them.
        graph: The graph, with the culprits pinned.
        symmetries: Name of a symmetry → group → where its elements act, for the groups at which it holds.
        refusals: Sentences on what keeps gains and biases out of the normal form in which neurons may be rotated.
        untied: Sentences on what more is allowed once tied weights are separate, as a fusion makes them.
    """

    groups: int
    families: int
    certified: int
    pinned: int
    max_error: float | None
    preserved: bool | None
    rows: tuple[dict[str, Any], ...]
    pins: tuple[str, ...]
    warnings: tuple[str, ...]
    culprits: tuple[str, ...]
    graph: ModelGraph
    symmetries: Mapping[str, Mapping[str, Places]]
    refusals: tuple[str, ...] = ()
    untied: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Where a symmetry holds.

    Attributes:
        symmetry: Which one.
        places: Group → where its elements act.
        error: Largest change of the output with all groups transformed; None where there is no group.
        certified: Groups at which a part of an element alone changes the output.
        culprits: Groups that were found, and refuted → in which case; empty for that of the trace.
    """

    symmetry: AbstractSymmetry
    places: Mapping[str, Places]
    error: float | None
    certified: frozenset[str]
    culprits: Mapping[str, str]


def check(
    make: Callable[[], nn.Module],
    graph: ModelGraph,
    inputs: tuple[object, ...],
    symmetries: Sequence[AbstractSymmetry],
    *,
    seed: int = 0,
    trials: int = 2,
) -> CheckReport:
    """Verifies the symmetries of a model on fresh instances, and pins the groups that do not hold.

    Args:
        make: Gives a fresh instance each time; it must never have been run.
        graph: The graph of one of them.
        inputs: The inputs that it was traced at.
        symmetries: What may be done to neurons.
        seed: Seed of the random weights, inputs and elements.
        trials: How often random elements are planted in all groups together.
    """
    first = Proof(make, inputs, seed)
    planted = PlantedProof(make, inputs, seed, graph)
    program = graph.program
    runs = _runs(first, graph)
    verdicts = []
    # What the trace claims comes first: what is refuted there is pinned for all others.
    for symmetry in (each for each in symmetries if each.is_traced):
        verdicts.append(judge(symmetry, graph, find_proven(symmetry, graph, planted), runs, trials))
        graph = _without_culprits(graph, verdicts[-1].culprits)
    named = with_rotary_groups(graph)
    for symmetry in (each for each in symmetries if not each.is_traced):
        places = find_proven(symmetry, named, planted)
        # A normal form is looked for where a symmetry that holds in it alone was guessed at all.
        seen = runs.rewritten(planted.normal_form) if symmetry.in_normal_form and places else runs
        verdicts.append(judge(symmetry, named, places, seen, trials))
    told = "" if program is None else recorded_sentence(program, first)
    report = _report(graph, verdicts, first, told, named)
    return replace(report, refusals=planted.known_refusals)


def without_refuted(
    make: Callable[[], nn.Module],
    graph: ModelGraph,
    inputs: tuple[object, ...],
    symmetries: Sequence[AbstractSymmetry],
    *,
    seed: int = 0,
) -> ModelGraph:
    """Returns the graph with the groups pinned that `check` refutes; only runs on what the trace claims are made.

    Args:
        make: Gives a fresh instance each time; it must never have been run.
        graph: The graph of one of them.
        inputs: The inputs that it was traced at.
        symmetries: What may be done to neurons.
        seed: Seed of the random weights, inputs and elements.
    """
    runs = _runs(Proof(make, inputs, seed), graph)
    for symmetry in symmetries:
        if symmetry.is_traced and graph.free_groups:
            places = dict(symmetry.find(graph, PlantedProof(make, inputs, seed, graph)))
            graph = _without_culprits(graph, _refuted(symmetry, graph, places, runs, 1))
    return graph


def _runs(first: Proof, graph: ModelGraph) -> Runs:
    program = graph.program
    cases = () if program is None or not graph.free_groups else other_cases(first, program.branches)
    return Runs([first, *first.at_other_shapes()], tuple(cases))


def _without_culprits(graph: ModelGraph, culprits: Mapping[str, str]) -> ModelGraph:
    for key, where in culprits.items():
        graph = pinned(graph, [key], f"the function changed when it was reordered{where}")
    return graph


@dataclass(frozen=True)
class Runs:
    """What a symmetry is judged by.

    Attributes:
        draws: The runs to compare with: the first at the shapes of the trace.
        cases: Runs in cases that the trace did not record.
        form: In which the states of the draws are.
    """

    draws: Sequence[Proof]
    cases: Sequence[OtherCase] = ()
    form: NormalForm = field(default_factory=NormalForm)

    def rewritten(self, form: NormalForm) -> Runs:
        """Returns runs at the same draws with their states in normal form."""
        return Runs([draw.of(form.of_state(draw.state)) for draw in self.draws], form=form)

    def again(self) -> Proof:
        """Returns a run at another draw, its state in the same form."""
        draw = self.draws[0].again()
        return draw.of(self.form.of_state(draw.state)) if self.form.rewrites else draw

    @property
    def is_repeatable(self) -> bool:
        """Whether two runs of the same weights on the same inputs are the same."""
        return self.draws[0].is_repeatable


def judge(
    symmetry: AbstractSymmetry, graph: ModelGraph, places: Mapping[str, Places], runs: Runs, trials: int
) -> Verdict:
    """Returns where a symmetry holds for all groups together, at every draw of weights and inputs, in every case.

    Where two runs differ anyway, no group is to blame, and none is refuted.

    Args:
        symmetry: What is planted.
        graph: The model's graph.
        places: Where it was found.
        runs: What it is judged by.
        trials: How often random elements are planted.
    """
    culprits = _refuted(symmetry, graph, places, runs, trials)
    lost = with_families(graph, culprits)
    places = {key: kept for key, kept in places.items() if key not in lost}
    error = _largest(planted_error(draw, symmetry, graph, places) for draw in runs.draws)
    return Verdict(symmetry, places, error, _certified(symmetry, graph, places, runs), culprits)


def _refuted(
    symmetry: AbstractSymmetry, graph: ModelGraph, places: Mapping[str, Places], runs: Runs, trials: int
) -> dict[str, str]:
    """Returns the groups that a run refutes → in which case; nothing where two runs differ anyway."""
    culprits: dict[str, str] = {}
    asked: list[tuple[Comparison, int, str]] = [
        *((draw, trials, "") for draw in runs.draws),
        *((case, 1, f", {case.name}") for case in runs.cases),
    ]
    for run, count, where in asked if runs.is_repeatable else []:
        while (error := planted_error(run, symmetry, graph, places, count)) is not None and error > run.tolerance:
            refuted = find_culprits(run, symmetry, graph, places)
            culprits |= dict.fromkeys(refuted, where)
            lost = with_families(graph, refuted)
            places = {key: kept for key, kept in places.items() if key not in lost}
    return culprits


def _certified(
    symmetry: AbstractSymmetry, graph: ModelGraph, places: Mapping[str, Places], runs: Runs
) -> frozenset[str]:
    """Returns the groups at which one place alone matters, at a draw or at another of weights and inputs."""
    certified = {key for key in places if is_sensitive(runs.draws[0], symmetry, graph, key, places[key])}
    rest = [key for key in places if key not in certified]
    if rest:
        again = runs.again()
        certified |= {key for key in rest if is_sensitive(again, symmetry, graph, key, places[key])}
    return frozenset(certified)


def _largest(errors: Iterable[float | None]) -> float | None:
    return max((error for error in errors if error is not None), default=None)


def _report(graph: ModelGraph, verdicts: Sequence[Verdict], draw: Proof, told: str, named: ModelGraph) -> CheckReport:
    traced = [verdict for verdict in verdicts if verdict.symmetry.is_traced]
    certified = set().union(*[verdict.certified for verdict in traced])
    culprits = tuple(itertools.chain.from_iterable(verdict.culprits for verdict in traced))
    error = _largest(verdict.error for verdict in traced)
    axes = [_fixed_axes(graph, name) for name in graph.layouts if name not in graph.buffers]
    return CheckReport(
        groups=len(graph.free_groups),
        families=sum(graph.family_size(key) for key in graph.free_groups),
        certified=len(certified),
        pinned=sum(axes),
        max_error=error,
        preserved=None if error is None else error <= draw.tolerance,
        rows=tuple(_rows(named, certified, culprits, verdicts)),
        pins=graph.pin_sentences(),
        warnings=(*graph.diagnostics.sentences, *_run_sentences(draw), *([told] if told else [])),
        culprits=culprits,
        graph=graph,
        symmetries={verdict.symmetry.name: verdict.places for verdict in verdicts},
    )


def _rows(
    graph: ModelGraph, certified: set[str], culprits: Sequence[str], verdicts: Sequence[Verdict]
) -> Iterator[dict[str, Any]]:
    for key, group in graph.groups.items():
        held = [verdict.symmetry.name for verdict in verdicts if key in verdict.places]
        if group.is_free or key in culprits or held:
            yield {
                "name": key,
                "size": group.size,
                "orders": graph.family_size(key),
                "members": len({slot.parameter for slot in group.members}),
                "status": "certified" if key in certified else ("pinned" if group.pin else "not certified"),
                "flags": sorted(group.flags),
                "symmetries": held,
            }


def _fixed_axes(graph: ModelGraph, parameter: str) -> int:
    """Returns how many axes of a parameter hold no free group."""
    layouts = graph.layouts[parameter]
    return sum(
        layout_size(layout) > 1 and not any(key in graph.free_groups for key in leaf_groups(layout))
        for layout in layouts
    )


def _run_sentences(draw: Proof) -> Iterator[str]:
    """Yields what the runs showed of the model itself."""
    yield from map(_left_sentence, draw.left_behind)
    if not draw.is_repeatable:
        yield (
            f"Two runs of fresh instances with the same weights on the same inputs differ (relative difference "
            f"{draw.noise:.2g}): something outside the state dict changes the function, so nothing is proven. Look for "
            "a counter or a random choice in forward."
        )


def _left_sentence(where: str) -> str:
    return (
        f"A forward leaves a tensor in '{where}', outside parameters and buffers. It was checked on fresh instances; "
        "trace and fuse instances that were never run, or the tensor may be stale."
    )
