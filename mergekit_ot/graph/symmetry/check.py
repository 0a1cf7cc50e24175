"""The planted-order test: reorder every group at random; the function must stay.

What would let the test lie is excluded: the model is never run before it is captured, every forward runs on a fresh
instance, parameters and buffers are randomised first (fresh norms are blind to order), and a group counts as
certified only if moving one of its members alone changes the output by far more than the model's own noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mergekit_ot.graph.axes.expressions import PinReason
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.layouts import layout_size, leaf_groups
from mergekit_ot.graph.symmetry.proof import Proof


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


def check(
    make: Callable[[], nn.Module],
    graph: ModelGraph,
    inputs: tuple[object, ...],
    *,
    seed: int = 0,
    trials: int = 2,
) -> CheckReport:
    """Verifies the neuron groups of a model on fresh instances and pins those that do not hold.

    Args:
        make: Gives a fresh instance each time; it must never have been run.
        graph: The graph of one of them.
        inputs: The inputs that it was traced at.
        seed: Seed of the random weights, inputs and orders.
        trials: Number of random orders of all groups.
    """
    proof = Proof(make, inputs, seed)
    culprits: list[str] = []
    shapes = [proof, *proof.at_other_shapes()]
    for at_shape in shapes:
        while (error := at_shape.error(graph, trials)) is not None and error > at_shape.tolerance:
            culprit = at_shape.bisect(graph, list(graph.free_groups))
            culprits += culprit
            graph = pinned(graph, culprit, "the function changed when it was reordered")
    errors = [found for at_shape in shapes if (found := at_shape.error(graph)) is not None]
    error = max(errors, default=None)
    certified = {key for key in graph.free_groups if proof.is_sensitive(graph, key)}
    if len(certified) < len(graph.free_groups):
        again = proof.again()
        certified |= {key for key in graph.free_groups if key not in certified and again.is_sensitive(graph, key)}
    return _report(graph, error, certified, culprits, proof)


def pinned(graph: ModelGraph, keys: list[str], why: str) -> ModelGraph:
    """Returns the graph with `keys` pinned, and every family indexed by one of them."""
    lost = set(keys)
    while True:
        more = {k for k, group in graph.free_groups.items() if lost & set(group.context)} - lost
        if not more:
            break
        lost |= more
    groups = {k: replace(g, pin=PinReason(why)) if k in lost else g for k, g in graph.groups.items()}
    return replace(graph, groups=groups)


def _report(
    graph: ModelGraph, error: float | None, certified: set[str], culprits: list[str], proof: Proof
) -> CheckReport:
    rows = []
    for key, group in graph.groups.items():
        if group.is_free or key in culprits:
            status = "certified" if key in certified else ("pinned" if group.pin else "not certified")
            members = len({slot.parameter for slot in group.members})
            rows.append({"name": key, "size": group.size, "orders": graph.family_size(key), "members": members,
                         "status": status, "flags": sorted(group.flags)})  # fmt: skip
    axes = [_fixed_axes(graph, name) for name in graph.layouts if name not in graph.buffers]
    preserved = None if error is None else error <= proof.tolerance
    return CheckReport(
        len(graph.free_groups), sum(graph.family_size(key) for key in graph.free_groups), len(certified),
        sum(axes), error, preserved, tuple(rows), graph.pin_sentences(),
        (*graph.diagnostics.sentences, *map(_left_sentence, proof.left_behind)),
        tuple(culprits), graph,
    )  # fmt: skip


def _fixed_axes(graph: ModelGraph, parameter: str) -> int:
    """Returns how many axes of a parameter hold no free group."""
    layouts = graph.layouts[parameter]
    return sum(
        layout_size(layout) > 1 and not any(key in graph.free_groups for key in leaf_groups(layout))
        for layout in layouts
    )


def _left_sentence(where: str) -> str:
    return (
        f"A forward leaves a tensor in '{where}', outside parameters and buffers. It was checked on fresh instances; "
        "trace and fuse instances that were never run, or the tensor may be stale."
    )
