"""One assignment: levels that make it faster, prices that it leaves for the next one, and when two are as good."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Smaller assignments take less time than their preparation: than a level for each row, than a choice between two.
_LEVELLED_FROM, _CHOSEN_FROM = 128, 256
# How much of a row's least cost makes its level; and where the columns' means are taken off first.
_LEVEL, _CENTRED_LEVEL = 0.5, 0.75
# Levels are good where few columns (rows are as telling, and are read faster) ask for one that another asks for too:
# where so many ask alone no others are looked at, and others are taken where so many times more do.
_ALONE, _MORE = 0.65, 1.1
# Prices far from the typical cost are those of a few neurons, and would cost all others digits.
_DEAREST = 4.0

# Returns the column of each row.
Solver = Callable[[np.ndarray], np.ndarray]


@dataclass
class Prices:
    """What is kept of an optimal permutation for the next one of a similar cost.

    Attributes:
        largest: No cost has a larger absolute value; it is finite.
        columns: What each source neuron was worth, a dual price up to a common number; None before the first.
    """

    largest: float
    columns: np.ndarray | None = None


def assigned(solver: Solver, cost: np.ndarray, prices: Prices | None = None) -> np.ndarray:
    """Returns the column of each row in an optimal assignment.

    With prices of a similar cost, few rows lack a column of their own when the search begins.

    Args:
        solver: Solves a cost whose rows and columns start out at zero; lapx.
        cost: Three rows and more, as many columns.
        prices: Those of a similar cost; they become those of this one.
    """
    if prices is None or cost.shape[0] < _CHOSEN_FROM:
        return solver(_levelled(cost))
    if prices.columns is None:
        columns, least = solver(_levelled(cost)), cost.min(1)
    else:
        priced = cost - prices.columns
        least = priced.min(1)
        priced -= least[:, None]
        columns = solver(priced)
    prices.columns = _worth(cost[np.arange(len(columns)), columns], least, columns)
    return columns


def _worth(paid: np.ndarray, least: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Returns new prices: what its row pays for a column beyond what the one that it likes best would leave it."""
    worth = np.empty_like(least)
    worth[columns] = paid - least
    worth -= worth.mean()
    middle = len(paid) // 2
    dearest = _DEAREST * np.partition(np.abs(paid), middle)[middle]
    return np.clip(worth, -dearest, dearest)


def _levelled(cost: np.ndarray) -> np.ndarray:
    """Returns a cost with the same optimal assignments that is solved faster: a level is taken off each row.

    The search begins at the least cost of each column, so cheap rows are asked for by many; levels are the prices of
    rows that it begins with. Half of the least cost is right where neurons lie among each other, as in few dimensions;
    in many dimensions norms say most about a distance, and means take them off.
    """
    if cost.shape[0] < _LEVELLED_FROM:
        return np.ascontiguousarray(cost)
    levels = _LEVEL * cost.min(1)
    if cost.shape[0] >= _CHOSEN_FROM:
        alone = _asking_alone(cost - _LEVEL * cost.min(0))
        if alone < _ALONE and _asking_alone(cost - _centred_levels(cost.T)) > _MORE * alone:
            levels = _centred_levels(cost)
    return np.ascontiguousarray(cost - levels[:, None])


def _centred_levels(cost: np.ndarray) -> np.ndarray:
    """Returns for each row its least cost beside the columns' means, and a part of its own mean."""
    # Halved sums do not overflow where the costs themselves are near the largest number.
    scale = 1.0 / cost.shape[0]
    rows, columns = ((cost * scale).sum(axis) for axis in (1, 0))
    return (1 - _CENTRED_LEVEL) * rows + _CENTRED_LEVEL * (cost - (columns - columns.mean())).min(1)


def _asking_alone(cost: np.ndarray) -> float:
    """Returns how many columns are the cheapest of some row, as a part of all."""
    return np.count_nonzero(np.bincount(cost.argmin(1), minlength=cost.shape[1])) / cost.shape[1]


def is_no_worse(kept: np.ndarray, found: np.ndarray, cost: np.ndarray, largest: float | None = None) -> bool:
    """Whether a permutation costs no more than another, up to rounding.

    Neurons that both couple alike play no part: of a few that are far larger than the others, the rounding alone would
    make up for any difference.

    Args:
        kept: Column of each row.
        found: The same of the other.
        cost: The cost.
        largest: No cost has a larger absolute value; None to look.
    """
    rows = np.flatnonzero(kept != found)
    if not len(rows):
        return True
    columns = found[rows]
    kept_cost, found_cost = (float(cost[rows, each[rows]].sum(dtype=np.float64)) for each in (kept, found))
    if kept_cost <= found_cost:
        return True
    largest = max(float(cost.max()), -float(cost.min())) if largest is None else largest
    rounding = 4 * float(np.finfo(cost.dtype).eps) * cost.shape[0]
    if kept_cost > found_cost + rounding * largest:
        return False
    return kept_cost <= found_cost + rounding * float(np.abs(cost[np.ix_(rows, columns)]).mean())
