"""Families of neurons that are coupled by rotations: the inner spaces of heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot.fusion.faced_tensors import FacedTensors, NestedCoupling
from mergekit_ot.transport.directions import gains_of, rotations_of
from mergekit_ot.transport.invertible import InvertibleMap


def rotated_coupling(tensors: Sequence[FacedTensors], symmetry: str) -> NestedCoupling:
    """Returns the rotation of one member of a family that leaves least apart in all tensors together.

    Args:
        tensors: Those that describe the family, which is open in all of them and comes first.
        symmetry: Which rotations are allowed.
    """
    rows = [faced.rows() for faced in tensors]
    ours, theirs = (torch.cat([side.double() for side in sides], 1) for sides in zip(*rows, strict=True))
    return rotated_members(ours[None], theirs[None], symmetry, tensors[0].ours.dtype)[0]


def rotated_members(
    ours: Float[Tensor, "p n d"], theirs: Float[Tensor, "p n d"], symmetry: str, dtype: torch.dtype | None = None
) -> list[NestedCoupling]:
    """Returns the rotations of the members of a family, all at once (the orthogonal Procrustes problem).

    Args:
        ours: What describes the fused neurons, member by member.
        theirs: The same of the source.
        symmetry: Which rotations are allowed.
        dtype: Type of the rotations; that of `ours` by default.
    """
    dtype = torch.promote_types(ours.dtype if dtype is None else dtype, torch.float32)
    ours, theirs = ours.double(), theirs.double()
    products = ours @ theirs.transpose(1, 2)
    rotations = rotations_of(products, symmetry)
    moments = ours.square().sum((1, 2)) + theirs.square().sum((1, 2))
    costs = (moments - 2 * (rotations * products).sum((1, 2))).clamp_min(0)
    return [
        NestedCoupling(InvertibleMap(rotation.to(dtype)), cost)
        for rotation, cost in zip(rotations, costs.tolist(), strict=True)
    ]


def rotated_costs(tensors: Sequence[FacedTensors], rotations: Mapping[str, str]) -> Float[Tensor, "m n"]:
    """Returns what each pair of neurons costs, every family that it holds rotated as well as can be.

    Args:
        tensors: Those that describe the neurons, which come first; each holds one family at most.
        rotations: Family → which rotations are allowed.
    """
    dtype = torch.promote_types(tensors[0].ours.dtype, torch.float32)
    cost = torch.zeros(tensors[0].ours.shape[0], tensors[0].theirs.shape[0], dtype=torch.float64)
    products: dict[str, Tensor] = {}
    for faced in tensors:
        ours, theirs = faced.ours.double(), faced.theirs.double()
        cost += ours.flatten(1).square().sum(1)[:, None] + theirs.flatten(1).square().sum(1)[None]
        if len(faced.groups) == 1:
            cost -= 2 * ours.flatten(1) @ theirs.flatten(1).T
        else:
            found = torch.einsum("jad,kbd->jkab", ours, theirs)
            family = faced.groups[1]
            products[family] = products[family] + found if family in products else found
    for family, found in products.items():
        gains = gains_of(found.flatten(0, 1), rotations[family])
        cost -= 2 * gains.reshape(cost.shape)
    return cost.clamp_min(0).to(dtype)
