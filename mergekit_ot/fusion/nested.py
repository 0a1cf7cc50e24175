"""Nested couplings: neurons that hold families of neurons, coupled with what they hold.

What two neurons cost is what the best couplings of all that they hold leave apart, in all tensors together. So a
coupling of the outer neurons is found with the couplings inside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot.fusion.faced_tensors import FacedTensors, Families, NestedCoupling
from mergekit_ot.fusion.rotated import rotated_costs, rotated_coupling
from mergekit_ot.transport.coupling import Coupling
from mergekit_ot.transport.ground_cost import assignment_costs, at_least_single, couple, ground_cost
from mergekit_ot.transport.measure import uniform_mass
from mergekit_ot.transport.scale import squarable
from mergekit_ot.transport.small import couple_each

# A tensor in which neurons stand with one family of theirs.
_OUTER_AND_INNER = 2
# Families that stand in one tensor are coupled in turn; a pair of neurons is judged after so many rounds.
_ROUNDS = 2


def nested_coupling(
    tensors: Sequence[FacedTensors],
    group: str,
    families: Families,
    sizes: tuple[int, int],
    prefer: Coupling | None = None,
    wants_inside: bool = True,
) -> NestedCoupling:
    """Returns the cheapest coupling of a group, with couplings of the families that its neurons hold.

    Args:
        tensors: Those that describe the group; `group` is open in all of them.
        group: Its key.
        families: Those inside its neurons, and theirs.
        sizes: Number of fused neurons and of the source's.
        prefer: A coupling to keep where it is as good.
        wants_inside: Whether the couplings of the families are to be told.
    """
    tensors = [faced.led_by(group) for faced in tensors]
    if group in families.rotations:
        return rotated_coupling(tensors, families.rotations[group])
    cost, blocks = _pair_costs(tensors, group, families, sizes)
    mass = uniform_mass(sizes[0], cost), uniform_mass(sizes[1], cost)
    coupling = couple(cost, *mass, prefer if prefer is not None and prefer.is_permutation else None)
    plan = coupling.transport_plan(cost)
    found = NestedCoupling(coupling, float((plan * cost).sum()) * sizes[0])
    if not wants_inside or all(len(faced.groups) == 1 for faced in tensors):
        return found
    if blocks is not None and blocks.shape[2] == blocks.shape[3] and coupling.is_permutation:
        family = next(key for faced in tensors for key in faced.groups if key != group)
        return replace(found, inside=_inside_of_one_family(family, blocks, coupling))
    inside = {}
    for j, k in plan.nonzero().tolist():
        inside[j, k] = _inside([each.cut(group, j, k) for each in tensors], families)
    return replace(found, inside=inside)


def coupled_members(
    ours: Float[Tensor, "p n d"], theirs: Float[Tensor, "p n d"], prefer: Sequence[Coupling | None]
) -> list[NestedCoupling]:
    """Returns the cheapest couplings of the members of a family, all at once.

    Args:
        ours: What describes the fused neurons, member by member.
        theirs: The same of the source.
        prefer: A coupling each to keep where it is as good.
    """
    ours, theirs = squarable(at_least_single(ours), at_least_single(theirs))
    norms = (torch.linalg.vector_norm(each, dim=2).square() for each in (ours, theirs))
    first, second = next(norms)[:, :, None], next(norms)[:, None, :]
    costs = (first + second).baddbmm_(ours, theirs.transpose(1, 2), alpha=-2).clamp_(min=0)
    couplings, least = couple_each(costs, prefer)
    return [NestedCoupling(each, cost) for each, cost in zip(couplings, least.tolist(), strict=True)]


def _inside_of_one_family(
    family: str, blocks: Float[Tensor, "m n a a"], coupling: Coupling
) -> dict[tuple[int, int], dict[str, NestedCoupling]]:
    """Returns the couplings of a family inside each pair of neurons, from the costs that the pairs were judged by."""
    partners = coupling.partners().to(blocks.device)
    couplings, least = couple_each(blocks[torch.arange(len(partners), device=blocks.device), partners])
    found = zip(enumerate(partners.tolist()), couplings, least.tolist(), strict=True)
    return {pair: {family: NestedCoupling(inside, cost)} for pair, inside, cost in found}


def _pair_costs(
    tensors: Sequence[FacedTensors], group: str, families: Families, sizes: tuple[int, int]
) -> tuple[Float[Tensor, "m n"], Float[Tensor, "m n a b"] | None]:
    """Returns what each pair of neurons costs, every family that it holds coupled as well as can be.

    Where there is one family, what its neurons cost in each pair as well.
    """
    held_inside = {key for faced in tensors for key in faced.groups if key != group}
    if not tensors:
        return torch.zeros(sizes), None
    if not held_inside:
        return _joined_cost(tensors), None
    if held_inside <= families.rotations.keys() and all(len(faced.groups) <= _OUTER_AND_INNER for faced in tensors):
        return rotated_costs(tensors, families.rotations), None
    if len(held_inside) == 1:
        return _costs_of_one_family(tensors, sizes)
    held = squarable(*(at_least_single(each) for faced in tensors for each in (faced.ours, faced.theirs)))
    cost = torch.zeros(sizes, dtype=held[0].dtype)
    for j in range(sizes[0]):
        for k in range(sizes[1]):
            cut = [faced.cut(group, j, k) for faced in tensors]
            found = _inside(cut, families)
            cost[j, k] = sum(_left_apart(faced, found, families) for faced in cut)
    return cost, None


def _costs_of_one_family(
    tensors: Sequence[FacedTensors], sizes: tuple[int, int]
) -> tuple[Float[Tensor, "m n"], Float[Tensor, "m n a b"]]:
    """Returns what each pair of neurons costs where they hold one family, and its neurons: one product."""
    alone = [faced for faced in tensors if len(faced.groups) == 1]
    nested = [faced for faced in tensors if len(faced.groups) > 1]
    inner = nested[0].ours.shape[1], nested[0].theirs.shape[1]
    joined = _joined_cost(nested)
    blocks = joined.reshape(sizes[0], inner[0], sizes[1], inner[1]).transpose(1, 2)
    cost = _joined_cost(alone) if alone else torch.zeros(sizes).to(joined)
    if inner[0] == inner[1]:
        return cost + assignment_costs(blocks.reshape(-1, *inner)).reshape(sizes), blocks
    found = torch.zeros_like(cost)
    mass = uniform_mass(inner[0], joined), uniform_mass(inner[1], joined)
    for j in range(sizes[0]):
        for k in range(sizes[1]):
            block = blocks[j, k]
            found[j, k] = (couple(block, *mass).transport_plan(block) * block).sum() * inner[0]
    return cost + found, blocks


def _joined_cost(tensors: Sequence[FacedTensors]) -> Tensor:
    """Returns the distances of rows in all tensors together."""
    rows = [faced.rows() for faced in tensors]
    return ground_cost(torch.cat([ours for ours, _ in rows], 1), torch.cat([theirs for _, theirs in rows], 1))


def _inside(tensors: Sequence[FacedTensors], families: Families) -> dict[str, NestedCoupling]:
    """Returns couplings of all open families, found in turn."""
    present = list(dict.fromkeys(key for faced in tensors for key in faced.groups))
    roots = [key for key in present if not set(families.contexts.get(key, ())) & set(present)]
    found: dict[str, NestedCoupling] = {}
    rounds = _ROUNDS if len(roots) > 1 else 1
    for _ in range(rounds):
        for root in roots:
            seen = _seen_by(root, tensors, roots, found, families)
            faced = next(each for each in tensors if root in each.groups)
            place = faced.groups.index(root)
            sizes = faced.ours.shape[place], faced.theirs.shape[place]
            found[root] = nested_coupling(seen, root, families, sizes)
    return found


def _seen_by(
    root: str,
    tensors: Sequence[FacedTensors],
    roots: Sequence[str],
    found: Mapping[str, NestedCoupling],
    families: Families,
) -> list[FacedTensors]:
    """Returns the tensors that describe a family, with what stands beside it coupled, its own families open."""
    own = {root, *(key for faced in tensors for key in faced.groups if root in families.contexts.get(key, ()))}
    seen = []
    for faced in tensors:
        if root not in faced.groups:
            continue
        beside = [key for key in faced.groups if key not in own]
        if any(key not in found or found[key].inside for key in beside):
            continue
        for key in beside:
            faced = faced.moved(key, found[key].coupling)
        seen.append(faced)
    return seen


def _left_apart(faced: FacedTensors, found: Mapping[str, NestedCoupling], families: Families) -> float:
    """Returns the squared distance of two tensors under couplings of all their groups."""
    if not faced.groups:
        ours, theirs = squarable(at_least_single(faced.ours), at_least_single(faced.theirs))
        return float((ours - theirs).square().sum())
    root = next(key for key in faced.groups if key in found)
    nested = found[root]
    if not nested.inside:
        return _left_apart(faced.moved(root, nested.coupling), found, families)
    total = 0.0
    plan = nested.coupling.transport_plan()
    for j, k in plan.nonzero().tolist():
        share = float(plan[j, k]) * plan.shape[0]
        total += share * _left_apart(faced.cut(root, j, k), {**found, **nested.inside[j, k]}, families)
    return total
