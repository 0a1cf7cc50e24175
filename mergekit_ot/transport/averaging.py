"""The weighted mean over sources, some of which lack some of the fused neurons."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot.errors import SolverError


class Share(NamedTuple):
    """What one source brings to a mean.

    Attributes:
        weight: Its weight, above zero.
        values: Its values, moved to the fused neurons; zero where it lacks one.
        presence: 1 where it has a counterpart and 0 elsewhere, broadcast against the values; None where it has all.
    """

    weight: float
    values: Float[Tensor, "*shape"]
    presence: Float[Tensor, "*shape"] | None = None


def mean_over_present(shares: Iterable[Share]) -> Float[Tensor, "*shape"]:
    """Returns ``Σ_i λ_i x_i / Σ_i λ_i p_i``: what has no partner in some source is the mean over the others.

    Shares are taken one after the other, so that an iterator needs one source's values in memory at a time. What no
    source has stays zero. Where every source has everything, the weights are taken to sum to one.

    Raises:
        SolverError: There is no share.

    Example:
        >>> shares = [
        ...     Share(0.5, torch.tensor([2.0, 4.0])),
        ...     Share(0.5, torch.tensor([0.0, 8.0]), torch.tensor([0.0, 1.0])),
        ... ]
        >>> mean_over_present(shares)
        tensor([2., 6.])
    """
    total: Tensor | None = None
    presences: list[tuple[float, Tensor | None]] = []
    for weight, values, presence in shares:
        presences.append((weight, presence))
        total = values * weight if total is None else total.add_(values, alpha=weight)
    if total is None:
        raise SolverError("There is no source with a weight above zero, so there is no mean. Give one a weight.")
    if all(presence is None for _, presence in presences):
        return total
    share = weight_present(presences, total.real)
    return total / torch.where(share > 0, share, torch.ones_like(share))


def weight_present(shares: Iterable[tuple[float, Tensor | None]], like: Tensor) -> Tensor:
    """Returns the weight of all sources that are present, place by place.

    Args:
        shares: Weight and presence of each source: 1 or 0 at each place, or None where it is present at all.
        like: Has the shape, the dtype and the device of the result.

    Example:
        >>> weight_present([(0.25, None), (0.75, torch.tensor([1.0, 0.0]))], torch.empty(2)).tolist()
        [1.0, 0.25]
    """
    total = torch.zeros_like(like)
    for weight, here in shares:
        total += weight if here is None else weight * here
    return total
