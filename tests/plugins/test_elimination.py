"""Many neurons at a time: what stands in for another must not go with it."""

from __future__ import annotations

import pytest
import torch
from mergeot_repair.refit import pruning
from mergeot_repair.refit.pruning import Products, Regression, eliminate


def test_of_a_network_and_its_copy_no_step_drops_a_neuron_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    # As of wide layers: several neurons go in one step.
    monkeypatch.setattr(pruning, "_STEPS", 4)
    torch.manual_seed(0)
    half = torch.randn(200, 24)
    products = Products(has_shift=False)
    products.add(torch.cat([half, half], 1), half @ torch.randn(24, 6))
    regression = Regression(products, torch.eye(6), torch.arange(48))
    left = eliminate([regression], {"g": [torch.arange(24), torch.arange(24, 48)]}, {"g": 24})["g"]
    assert sorted((left % 24).tolist()) == list(range(24))
