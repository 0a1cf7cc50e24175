"""Many small assignments at once: what one after the other gives, ties and preferences included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_ot import Permutation, SolverError, couple
from mergekit_ot.transport.small import couple_each


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(0, 7), st.integers(0, 10_000), st.booleans(), st.sampled_from([1, 3, 1000]))
def test_each_is_coupled_as_by_itself(size: int, count: int, seed: int, is_preferred: bool, levels: int) -> None:
    """Whole numbers of few levels have many optimal orders."""
    generator = torch.Generator().manual_seed(seed)
    costs = torch.randint(0, levels, (count, size, size), generator=generator).float()
    orders = [Permutation(torch.randperm(size, generator=generator)) for _ in range(count)]
    prefer = [order if is_preferred and place % 2 == 0 else None for place, order in enumerate(orders)]
    found, least = couple_each(costs, prefer)
    assert len(found) == count
    for each, cost, kept, total in zip(found, costs, prefer, least.tolist(), strict=True):
        alone = couple(cost, prefer=kept)
        rows = torch.arange(size)
        assert float(cost[rows, alone.partners()].sum()) == total == float(cost[rows, each.partners()].sum())
        if kept is not None and float(cost[rows, kept.partners()].sum()) == total:
            assert each is kept
        elif float(cost.trace()) == total:
            assert each.is_identity


def test_costs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(SolverError, match="not finite"):
        couple_each(torch.full((2, 3, 3), float("nan")))
