"""Nested transport: groups whose neurons hold families of neurons of their own (grouped convolution, heads).

The cost of two outer neurons is what the best couplings of the families they hold leave apart (`nested.py`). Couplings
are exact, and those of one source that has the fused sizes are the identity. Where the fused model has more outer
neurons than any source, they are copies of those of one (`widening.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from mergekit_ot.errors import SolverError
from mergekit_ot.fusion.alignment import Alignment, FamilyCoupling, Pairs
from mergekit_ot.fusion.faced_blocks import FacedBlock, faced_blocks
from mergekit_ot.fusion.faced_tensors import Families, NestedCoupling
from mergekit_ot.fusion.group_view import GroupView
from mergekit_ot.fusion.nested import coupled_members, nested_coupling
from mergekit_ot.fusion.rotated import rotated_members
from mergekit_ot.fusion.widening import Anchor, copied, copies_of
from mergekit_ot.transport.coupling import Coupling
from mergekit_ot.transport.permutation import Permutation

GroupCouplings = tuple[Coupling | FamilyCoupling, ...]


def has_open_families(view: GroupView) -> bool:
    """Whether the group stands in a tensor together with families that are indexed by it."""
    groups, alignment = view.alignment.target.groups, view.alignment
    return any(view.group in group.context and alignment.is_open(key) for key, group in groups.items())


def anchor_of(view: GroupView, model_weights: tuple[float, ...]) -> Anchor:
    """Returns the source that the others are coupled to: the heaviest one with the fused sizes.

    Where there is none, the heaviest one whose neurons can be copied: only outer ones, such as heads, are too few.

    Raises:
        SolverError: No source has the fused sizes, and none can be widened to them.
    """
    fused = view.alignment.target.groups
    held = {view.group, *fused[view.group].context}
    # All families of a head share its anchor, or they would be coupled by different heads.
    keys = held | {key for key, group in fused.items() if held & set(group.context)}
    sizes = {key: fused[key].size for key in keys}
    held_sizes = [{key: graph.groups[key].size for key in keys} for graph in view.alignment.graphs]
    fitting = [place for place, own in enumerate(held_sizes) if own == sizes]
    if fitting:
        return Anchor(max(fitting, key=lambda place: (model_weights[place], -place)))
    outer = {key for key in keys if not fused[key].context}
    narrower = [
        place
        for place, own in enumerate(held_sizes)
        if all(own[key] == size or (key in outer and own[key] < size) for key, size in sizes.items())
    ]
    if not narrower:
        raise SolverError(
            f"Group '{view.group}' holds families of neurons (groups, heads), and no source has the fused model's "
            "sizes for it. Choose a target that keeps these sizes equal to one of the sources."
        )
    anchor = max(narrower, key=lambda place: (model_weights[place], sum(held_sizes[place].values()), -place))
    own = held_sizes[anchor]
    return Anchor(anchor, {key: copies_of(own[key], sizes[key]) for key in outer if own[key] < sizes[key]})


def couple_nested(
    view: GroupView, model_weights: tuple[float, ...]
) -> tuple[dict[str, tuple[Coupling | FamilyCoupling, ...]], float]:
    """Returns the couplings of a group that holds families or is one, and their cost.

    Every source is coupled with the anchor; where couplings are in force, with the mean of all other sources. Then
    the families inside the group get the couplings there that its own were found with.
    """
    anchor, key = anchor_of(view, model_weights), view.group
    families, group = _open_families(view), view.alignment.target.groups[view.group]
    in_force = all(each in view.alignment.couplings for each in (key, *families))
    held: GroupCouplings = view.alignment.couplings.get(key, ())
    total = 0.0
    for source in range(view.count):
        if source == anchor.source:
            identity = anchor.widened(key, NestedCoupling(Permutation.identity(view.size(source)), 0.0))
            found = dict.fromkeys(coupled_pairs(view.alignment, group.context, source), identity)
        else:
            others = _others(view, source, anchor.source, model_weights, in_force)
            described = list(faced_blocks(view, source, others, families, anchor))
            held_families = Families(families, view.alignment.rotations)
            found = _coupled(view, source, anchor, described, held_families, in_force)
        total += model_weights[source] * sum(each.cost for each in found.values())
        members = {pairs: each.coupling for pairs, each in found.items()}
        held = (*held[:source], FamilyCoupling(members) if group.context else members[()], *held[source + 1 :])
        if in_force:
            view = replace(view, alignment=_with_inside(view.alignment, key, held, source, found))
    inside = {each: view.alignment.couplings[each] for each in families} if in_force else {}
    return {key: held, **inside}, total / max(group.size * view.alignment.target.family_size(key), 1)


def _open_families(view: GroupView) -> dict[str, tuple[str, ...]]:
    """Returns the families inside the group that are to be coupled, and what each is indexed by."""
    alignment = view.alignment
    free = {key: group.context for key, group in alignment.target.groups.items() if alignment.is_open(key)}
    families = {key: context for key, context in free.items() if view.group in context}
    graphs = (alignment.target, *alignment.graphs)
    return {key: families[key] for key in families if any(graph.groups[key].size > 1 for graph in graphs)}


def _others(
    view: GroupView, source: int, anchor: int, model_weights: tuple[float, ...], in_force: bool
) -> dict[int, float]:
    """Returns the sources that one is coupled with, and their shares."""
    weights = {other: weight for other, weight in enumerate(model_weights) if other != source and weight > 0}
    total = sum(weights.values())
    if not in_force or total == 0:
        return {anchor: 1.0}
    return {other: weight / total for other, weight in weights.items()}


def _coupled(
    view: GroupView,
    source: int,
    anchor: Anchor,
    described: Sequence[FacedBlock],
    families: Families,
    wants_inside: bool,
) -> dict[Pairs, NestedCoupling]:
    """Returns the cheapest couplings of one source, for every pair of outer neurons that are coupled."""
    alignment, key = view.alignment, view.group
    sizes = anchor.size(key, alignment.target), view.size(source)
    wanted = coupled_pairs(alignment, alignment.target.groups[key].context, source)
    if not anchor.originals and _come_at_once(view, source, described, sizes):
        return _members(view, source, described, wanted)
    found = {}
    for pairs in wanted:
        prefer = alignment.coupling(key, source, pairs) if key in alignment.couplings else None
        tensors = [each.at(pairs) for each in described]
        found[pairs] = anchor.widened(key, nested_coupling(tensors, key, families, sizes, prefer, wants_inside))
    return found


def _come_at_once(view: GroupView, source: int, described: Sequence[FacedBlock], sizes: tuple[int, int]) -> bool:
    """Whether all members of a family can be coupled in one go: they hold none, and only change places."""
    alignment = view.alignment
    context = alignment.target.groups[view.group].context
    if not context or not described or sizes[0] != sizes[1] or any(each.held for each in described):
        return False
    return all(key not in alignment.couplings or alignment.couplings[key][source].is_permutation for key in context)


def _members(
    view: GroupView, source: int, described: Sequence[FacedBlock], wanted: Sequence[Pairs]
) -> dict[Pairs, NestedCoupling]:
    """Returns the cheapest couplings of all members of a family."""
    alignment, key = view.alignment, view.group
    ordered = sorted(wanted, key=_fused_side)
    prefer = [alignment.coupling(key, source, pairs) if key in alignment.couplings else None for pairs in ordered]
    faced = [each.members() for each in described]
    ours, theirs = (torch.cat(side, 2) for side in zip(*faced, strict=True))
    rotation = alignment.rotations.get(key)
    found = coupled_members(ours, theirs, prefer) if rotation is None else rotated_members(ours, theirs, rotation)
    return dict(zip(ordered, found, strict=True))


def _with_inside(
    alignment: Alignment, key: str, held: GroupCouplings, source: int, found: Mapping[Pairs, NestedCoupling]
) -> Alignment:
    """Returns an alignment in which couplings of a group hold, and those found inside it for a source."""
    alignment = alignment.with_couplings({key: held})
    alignment = alignment.with_couplings(kept_up(alignment, key))
    groups, members = alignment.target.groups, {}
    context = groups[key].context
    for pairs, nested in found.items():
        _collect(alignment, key, nested, dict(zip(context, pairs, strict=True)), members)
    for family in sorted(members, key=lambda each: len(groups[each].context)):
        couplings = alignment.couplings[family]
        mine = couplings[source]
        if isinstance(mine, FamilyCoupling):
            # A deeper family was asked for other pairs by the couplings above it; they are all there by now.
            new = {pairs: members[family].get(pairs, member) for pairs, member in mine.members.items()}
            alignment = alignment.with_couplings(
                {family: (*couplings[:source], FamilyCoupling(new), *couplings[source + 1 :])}
            )
            alignment = alignment.with_couplings(kept_up(alignment, family))
    return alignment


def _collect(
    alignment: Alignment,
    key: str,
    nested: NestedCoupling,
    outer: Mapping[str, tuple[int, int]],
    members: dict[str, dict[Pairs, Coupling]],
) -> None:
    """Adds the couplings inside a nested one to `members`, by family and pairs of its context."""
    for pair, inside in nested.inside.items():
        pairs = {**outer, key: pair}
        for family, found in inside.items():
            context = alignment.target.groups[family].context
            if set(context) <= set(pairs):
                members.setdefault(family, {})[_in_order(pairs, context)] = found.coupling
                _collect(alignment, family, found, pairs, members)


def kept_up(alignment: Alignment, key: str) -> dict[str, tuple[FamilyCoupling, ...]]:
    """Returns the families in force that are indexed by a group, for the pairs that its couplings relate now.

    When an outer group gets other couplings, its families are asked for pairs that nobody solved. Until they are
    solved anew, such a pair takes the member that its fused neuron had: every member has the same sizes, so each is
    a valid coupling at any pair.

    Args:
        alignment: The new couplings of `key` hold in it.
        key: The group whose couplings changed.
    """
    groups, completed = alignment.target.groups, {}
    families = [family for family in alignment.couplings if groups[family].context]
    for family in sorted(families, key=lambda each: len(groups[each].context)):
        context = groups[family].context
        if key not in context and not completed.keys() & set(context):
            continue
        members = [found for found in alignment.couplings[family] if isinstance(found, FamilyCoupling)]
        completed[family] = tuple(
            _at_pairs(found, coupled_pairs(alignment, context, source)) for source, found in enumerate(members)
        )
        alignment = alignment.with_couplings({family: completed[family]})
    return completed


def _at_pairs(family: FamilyCoupling, wanted: list[Pairs]) -> FamilyCoupling:
    held = family.members
    if set(wanted) == set(held):
        return family
    by_fused = {_fused_side(pairs): member for pairs, member in held.items()}
    fallback = next(iter(held.values()))
    return FamilyCoupling({pairs: held.get(pairs) or by_fused.get(_fused_side(pairs), fallback) for pairs in wanted})


def _fused_side(pairs: Pairs) -> tuple[int, ...]:
    return tuple(fused for fused, _ in pairs)


def starts_of(alignment: Alignment, keys: Iterable[str]) -> dict[str, GroupCouplings] | None:
    """Returns couplings of groups that leave every neuron where it is; None where there are none.

    Outer neurons that hold families, of which the fused model has more, stand there several times.
    """
    groups, found = alignment.target.groups, dict[str, GroupCouplings]()
    for key in sorted(keys, key=lambda key: len(groups[key].context)):
        sizes, size = {graph.groups[key].size for graph in alignment.graphs}, groups[key].size
        is_outer = not groups[key].context and any(key in group.context for group in groups.values())
        if sizes != {size} and not (is_outer and len(sizes) == 1 and max(sizes) < size):
            return None
        # Sources of one size start alike.
        found[key] = (start_of(alignment, key, 0),) * len(alignment.graphs)
        alignment = alignment.with_couplings({key: found[key]})
    return found


def with_starts(alignment: Alignment, keys: Iterable[str]) -> Alignment:
    """Returns an alignment in which families that no coupling holds for stand where they are, as their heads do."""
    groups = alignment.target.groups
    for key in sorted(set(keys) - set(alignment.couplings), key=lambda key: len(groups[key].context)):
        if groups[key].context:
            starts = tuple(start_of(alignment, key, source) for source in range(len(alignment.graphs)))
            alignment = alignment.with_couplings({key: starts})
    return alignment


def start_of(alignment: Alignment, key: str, source: int) -> Coupling | FamilyCoupling:
    """Returns the coupling of a group with a source that leaves every neuron where it is, or copies it."""
    size, own = (graph.groups[key].size for graph in (alignment.target, alignment.graphs[source]))
    identity = Permutation.identity(own)
    context = alignment.target.groups[key].context
    if context:
        return FamilyCoupling(dict.fromkeys(coupled_pairs(alignment, context, source), identity))
    return identity if own == size else copied(identity, copies_of(own, size))


def coupled_pairs(alignment: Alignment, context: tuple[str, ...], source: int) -> list[Pairs]:
    """Returns every combination of (fused index, source index) of the context that the couplings relate."""
    combinations: list[dict[str, tuple[int, int]]] = [{}]
    for outer in sorted(context, key=lambda key: len(alignment.target.groups[key].context)):
        deeper = alignment.target.groups[outer].context
        extended = []
        for pairs in combinations:
            coupling = alignment.coupling(outer, source, tuple(pairs[key] for key in deeper))
            if coupling.is_permutation:
                related = list(enumerate(coupling.partners().tolist()))
            else:
                related = coupling.transport_plan().nonzero().tolist()
            extended += [{**pairs, outer: (j, k)} for j, k in related]
        combinations = extended
    return [_in_order(pairs, context) for pairs in combinations]


def _in_order(pairs: Mapping[str, tuple[int, int]], context: tuple[str, ...]) -> Pairs:
    return tuple(pairs[outer] for outer in context)
