"""Nested transport: groups whose neurons hold families of neurons of their own (grouped convolution, heads).

The outer cost of two outer neurons is the optimal transport cost between the families they hold; the families are
coupled afterwards, one pair of coupled outer neurons at a time. Couplings are exact and relate every source to one
source that has the fused sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from mergekit_ot.errors import SolverError
from mergekit_ot.fusion.alignment import Alignment, FamilyCoupling, Pairs
from mergekit_ot.fusion.group_view import GroupView
from mergekit_ot.fusion.moving import transport_block
from mergekit_ot.graph.blocks import Block, context_place
from mergekit_ot.graph.layouts import IN
from mergekit_ot.transport.coupling import Coupling
from mergekit_ot.transport.ground_cost import couple, ground_cost
from mergekit_ot.transport.measure import uniform_mass
from mergekit_ot.transport.permutation import Permutation
from mergekit_ot.transport.scale import squarable
from mergekit_ot.transport.solver import Scope


def has_open_families(view: GroupView) -> bool:
    """Whether the group stands in a tensor together with families that are indexed by it."""
    groups = view.alignment.target.groups
    return any(view.group in group.context for group in groups.values() if group.is_free)


def anchor_of(view: GroupView, model_weights: tuple[float, ...]) -> int:
    """Returns the source that the others are coupled to: the heaviest one with the fused sizes.

    Raises:
        SolverError: No source has the fused sizes.
    """
    fused = view.alignment.target.groups
    held = {view.group, *fused[view.group].context}
    # All families of a head share its anchor, or they would be coupled by different heads.
    keys = held | {key for key, group in fused.items() if held & set(group.context)}
    sizes = {key: fused[key].size for key in keys}
    held_sizes = [{key: graph.groups[key].size for key in keys} for graph in view.alignment.graphs]
    fitting = [place for place, own in enumerate(held_sizes) if own == sizes]
    if not fitting:
        raise SolverError(
            f"Group '{view.group}' holds families of neurons (groups, heads), and no source has the fused model's "
            "sizes for it. Choose a target that keeps these sizes equal to one of the sources."
        )
    return max(fitting, key=lambda place: (model_weights[place], -place))


def couple_outer(view: GroupView, model_weights: tuple[float, ...]) -> tuple[tuple[Coupling, ...], float]:
    """Returns the couplings of an outer group and their cost, from the transport costs between the families."""
    anchor = anchor_of(view, model_weights)
    reference = _slices(view, anchor)
    size = view.size(anchor)
    couplings: list[Coupling] = []
    total = 0.0
    for source in range(view.count):
        if source == anchor:
            couplings.append(Permutation.identity(size))
            continue
        slices = _slices(view, source)
        held = [rows for block in (*reference, *slices) for rows in block]
        # As single precision would not hold the squares of some, it would not hold their sums.
        dtype = None if all(one is other for one, other in zip(squarable(*held), held, strict=True)) else torch.float64
        cost = torch.zeros(size, view.size(source), dtype=dtype)
        for ours, theirs in zip(reference, slices, strict=True):
            for j, k in itertools.product(range(size), range(view.size(source))):
                cost[j, k] += _transport_cost(ours[j], theirs[k])
        found = couple(cost, uniform_mass(size, cost), uniform_mass(view.size(source), cost))
        couplings.append(found)
        total += model_weights[source] * float((found.transport_plan(cost) * cost).sum())
    return tuple(couplings), total


def couple_family(view: GroupView, model_weights: tuple[float, ...]) -> tuple[tuple[FamilyCoupling, ...], float]:
    """Returns the couplings of a family whose context is aligned, one per pair of coupled outer neurons."""
    alignment, group = view.alignment, view.group
    anchor = anchor_of(view, model_weights)
    context = alignment.target.groups[group].context
    families: list[FamilyCoupling] = []
    total = 0.0
    for source in range(view.count):
        members: dict[Pairs, Coupling] = {}
        for pairs in coupled_pairs(alignment, context, source):
            if source == anchor:
                members[pairs] = Permutation.identity(view.size(anchor))
                continue
            ours = _rows(view, anchor, context, tuple((j, j) for j, _ in pairs))
            theirs = _rows(view, source, context, pairs)
            cost = ground_cost(ours, theirs)
            mass = uniform_mass(ours.shape[0], cost), uniform_mass(theirs.shape[0], cost)
            members[pairs] = couple(cost, *mass)
            total += model_weights[source] * float((members[pairs].transport_plan(cost) * cost).sum())
        families.append(FamilyCoupling(members))
    return tuple(families), total / max(alignment.target.family_size(group), 1)


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


def identity_family(alignment: Alignment, group: str) -> FamilyCoupling:
    """Returns the family of couplings that leaves every neuron where it is."""
    fused = alignment.target.groups
    ranges = [range(fused[outer].size) for outer in fused[group].context]
    return FamilyCoupling(
        {tuple((j, j) for j in index): Permutation.identity(fused[group].size) for index in itertools.product(*ranges)}
    )


def coupled_pairs(alignment: Alignment, context: tuple[str, ...], source: int) -> list[Pairs]:
    """Returns every combination of (fused index, source index) of the context that the couplings relate."""
    combinations: list[dict[str, tuple[int, int]]] = [{}]
    for outer in sorted(context, key=lambda key: len(alignment.target.groups[key].context)):
        deeper = alignment.target.groups[outer].context
        extended = []
        for pairs in combinations:
            coupling = alignment.coupling(outer, source, tuple(pairs[key] for key in deeper))
            plan = coupling.transport_plan()
            extended += [{**pairs, outer: (j, k)} for j, k in plan.nonzero().tolist()]
        combinations = extended
    return [_in_order(pairs, context) for pairs in combinations]


def _in_order(pairs: Mapping[str, tuple[int, int]], context: tuple[str, ...]) -> Pairs:
    return tuple(pairs[outer] for outer in context)


def _transport_cost(ours: Tensor, theirs: Tensor) -> float:
    cost = ground_cost(ours, theirs)
    if cost.shape == (1, 1):
        return float(cost)
    plan = couple(cost, uniform_mass(ours.shape[0], cost), uniform_mass(theirs.shape[0], cost)).transport_plan(cost)
    return float((plan * cost).sum()) * ours.shape[0]


def _usable(view: GroupView, source: int, block: Block, name: str, open_groups: set[str]) -> bool:
    others = {d.group for d in block.dimensions if d.group is not None} - {view.group}
    roles = view.alignment.graphs[source].roles
    if view.scope is Scope.INCOMING:
        mine = [d for d in block.dimensions if d.group == view.group]
        if any(roles[name, d.axis, view.group] == IN for d in mine):
            return False
    return all(other in open_groups or view.alignment.is_aligned(other) for other in others)


def _slices(view: GroupView, source: int) -> list[list[Tensor]]:
    """Returns, per block, one matrix per outer neuron: the rows of the families it holds."""
    alignment = view.alignment
    families = {k for k, g in alignment.target.groups.items() if view.group in g.context and g.is_free}
    found = []
    for name, block in view.blocks(source):
        if not _usable(view, source, block, name, families):
            continue
        found.append(_family_rows(view, source, name, block, families))
    return found


def _family_rows(view: GroupView, source: int, name: str, block: Block, families: set[str]) -> list[Tensor]:
    alignment = view.alignment
    place = next(p for p, d in enumerate(block.dimensions) if d.group == view.group)
    # Families stay in the source's order: the transport between them is the cost.
    held = [p for p, d in enumerate(block.dimensions) if d.group in families]
    moved = transport_block(block, name, alignment, source, frozenset([place, *held]))
    ordered = moved.movedim([place, *held], list(range(1 + len(held))))
    inner = 1
    for dimension in (block.dimensions[p] for p in held):
        family = dimension.group or ""
        inner *= dimension.size
        if alignment.graphs[source].roles[name, dimension.axis, family] == IN:
            ordered = ordered * (dimension.size / alignment.target.groups[family].size)
    return list(ordered.reshape(view.size(source), inner, -1))


def _rows(view: GroupView, source: int, context: tuple[str, ...], pairs: Pairs) -> Tensor:
    """Returns one row per neuron of the family member at `pairs`, every other axis aligned."""
    rows = []
    for name, block in view.blocks(source):
        if not _usable(view, source, block, name, set()):
            continue
        place = next(p for p, d in enumerate(block.dimensions) if d.group == view.group)
        outer = {context_place(block.dimensions, place, key): pair for key, pair in zip(context, pairs, strict=True)}
        moved = transport_block(block, name, view.alignment, source, frozenset([place]), outer)
        order = [p for p in range(len(block.dimensions)) if p not in outer]
        row = moved.movedim(order.index(place), 0).reshape(view.size(source), -1)
        if view.alignment.graphs[source].roles[name, block.dimensions[place].axis, view.group] == IN:
            row = row * (view.size(source) / view.alignment.target.groups[view.group].size)
        rows.append(row)
    return torch.cat(rows, 1) if rows else torch.zeros(view.size(source), 0)
