"""Two rows are matched in order, at the least cost: by dynamic programming."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor


def match_in_order(costs: Float[Tensor, "own other"]) -> list[int] | None:
    """Returns the place in the longer row that each entry of the shorter one is matched to, in order, at least cost.

    Of several matches of equal cost it is the one whose last entries stand earliest.

    Args:
        costs: What it costs to match an entry (row) to a place (column); infinite where that cannot be.

    Returns:
        One place per entry, each larger than the one before; None where there is no match of finite cost.

    Example:
        >>> import torch
        >>> match_in_order(torch.tensor([[0.1, 0.0, 3.0], [3.0, 0.0, 1.0]]))
        [0, 1]
    """
    entries, places = costs.shape
    cost: list[list[float]] = costs.double().tolist()
    # Least cost of the first entries among the first places.
    least = [[0.0] * (places + 1)] + [[math.inf] * (places + 1) for _ in range(entries)]
    for entry in range(1, entries + 1):
        for place in range(entry, places + 1):
            taken = least[entry - 1][place - 1] + cost[entry - 1][place - 1]
            least[entry][place] = min(least[entry][place - 1], taken)
    if not math.isfinite(least[entries][places]):
        return None
    found: list[int] = []
    place = places
    for entry in range(entries, 0, -1):
        while least[entry][place - 1] == least[entry][place]:
            place -= 1
        place -= 1
        found.append(place)
    return found[::-1]
