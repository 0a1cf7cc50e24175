"""Exact transport plans of rectangular costs, wherever the costs lie: gradients are negative as often as not."""

from __future__ import annotations

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_ot import couple


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 10_000),
    st.floats(-1000, 1000),
    st.floats(0.01, 100),
)
def test_a_constant_or_a_scale_of_the_cost_changes_no_optimal_plan(rows, columns, seed, shift, scale):
    cost = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plan = couple(scale * cost + shift).transport_plan(cost)
    least = ot.emd2(ot.unif(rows), ot.unif(columns), cost.numpy())
    assert float((plan * cost).sum()) == pytest.approx(least, abs=1e-9)
    torch.testing.assert_close(plan.sum(1), torch.full((rows,), 1 / rows, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(0), torch.full((columns,), 1 / columns, dtype=torch.float64))


@pytest.mark.parametrize("sizes", [(5, 10), (7, 3), (49, 28)])
def test_costs_that_are_all_negative_have_a_plan(sizes):
    cost = -100 - torch.rand(sizes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = couple(cost).transport_plan(cost)
    assert float((plan * cost).sum()) < -100
