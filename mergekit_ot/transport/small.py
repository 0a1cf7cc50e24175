"""Many small assignments at once: all orders of a few neurons are tried together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergekit_ot.transport.coupling import Coupling
from mergekit_ot.transport.ground_cost import TRIED_SIZE, all_orders, couple
from mergekit_ot.transport.permutation import Permutation


def couple_each(
    costs: Float[Tensor, "p n n"], prefer: Sequence[Coupling | None] | None = None
) -> tuple[tuple[Coupling, ...], Float[Tensor, " p"]]:
    """Returns what `couple` returns for each of many costs, and the sum of each one's costs over its neurons.

    Args:
        costs: A ground cost each.
        prefer: A permutation each to keep where it is optimal up to rounding. Failing that, the identity is kept.

    Example:
        >>> costs = torch.tensor([[[9.0, 1.0], [4.0, 9.0]], [[1.0, 2.0], [2.0, 1.0]]])
        >>> couplings, least = couple_each(costs)
        >>> [coupling.partners().tolist() for coupling in couplings], least.tolist()
        ([[1, 0], [0, 1]], [5.0, 2.0])
    """
    count, size = costs.shape[:2]
    kept = prefer or [None] * count
    if not count or size > TRIED_SIZE or not bool(torch.isfinite(costs.sum())):
        found = tuple(couple(cost, prefer=each) for cost, each in zip(costs, kept, strict=True))
    else:
        index = _best_orders(costs, _indices(kept, size))
        found = tuple(
            each if each is not None and each.is_permutation and torch.equal(each.partners().cpu(), row) else own
            for each, row, own in zip(kept, index, (Permutation(row.to(costs.device)) for row in index), strict=True)
        )
    orders = torch.stack([each.partners() for each in found]) if count else torch.zeros(0, size, dtype=torch.long)
    return found, costs.gather(2, orders.to(costs.device)[:, :, None]).sum((1, 2))


def _best_orders(costs: Float[Tensor, "p n n"], kept: Int[Tensor, "p n"]) -> Int[Tensor, "p n"]:
    """Returns orders of least cost, on the CPU, those that are kept or the identity where they are as good."""
    costs = costs.detach().cpu()
    size = costs.shape[1]
    orders = all_orders(size)
    index = orders[costs[:, torch.arange(size), orders].sum(2).argmin(1)]
    identity = torch.arange(size).expand_as(index)
    is_kept, stays = (_are_no_worse(each, index, costs)[:, None] for each in (kept, identity))
    return torch.where(is_kept, kept, torch.where(stays, identity, index))


def _indices(couplings: Sequence[Coupling | None], size: int) -> Int[Tensor, "p n"]:
    identity = torch.arange(size)
    return torch.stack(
        [identity if each is None or not each.is_permutation else each.partners().cpu() for each in couplings]
    )


def _are_no_worse(kept: Int[Tensor, "p n"], found: Int[Tensor, "p n"], costs: Float[Tensor, "p n n"]) -> Tensor:
    """Whether each of some orders costs no more than another, up to the rounding of what both couple differently."""
    differs = kept != found
    kept_cost, found_cost = (
        (costs.gather(2, each[:, :, None])[:, :, 0].double() * differs).sum(1) for each in (kept, found)
    )
    columns = torch.zeros_like(differs).scatter_(1, found, differs)
    involved = differs[:, :, None] & columns[:, None, :]
    mean = (costs.abs() * involved).sum((1, 2)).double() / involved.sum((1, 2)).clamp_min(1)
    return kept_cost <= found_cost + 4 * torch.finfo(costs.dtype).eps * mean * costs.shape[1]
