"""Calibration data of a handful of samples."""

from __future__ import annotations

import pytest
import torch

from mergekit_ot import DataError
from mergekit_ot.fusion.samples import check_outliers


@pytest.mark.parametrize("count", [4, 9, 10, 11, 40])
def test_one_outlier_is_told_among_few_as_among_many(count: int) -> None:
    samples = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    check_outliers([samples])
    samples[2] = 1e5
    with pytest.raises(DataError, match="Sample 2 of the calibration data"):
        check_outliers([samples])
