"""Fusions without a repair tell of running statistics where a network has any, and only there."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import spectral_norm

from mergekit_ot import fuse

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("norm", "is_told"),
    [
        (nn.BatchNorm2d(6), True),
        (nn.BatchNorm2d(6, track_running_stats=False), False),
        (nn.InstanceNorm2d(6, affine=True, track_running_stats=True), True),
        (nn.InstanceNorm2d(6, affine=True), False),
        (nn.GroupNorm(2, 6), False),
    ],
    ids=str,
)
def test_statistics_that_are_kept_are_told(norm: nn.Module, is_told: bool) -> None:
    # The vectors of spectral norms are buffers too.
    model = nn.Sequential(spectral_norm(nn.Conv2d(3, 6, 3)), norm, nn.ReLU(), spectral_norm(nn.Conv2d(6, 2, 3)))
    result = fuse([model.eval(), model], example_inputs=IMAGES)
    assert any("running statistics" in sentence for sentence in result.warnings) is is_told
