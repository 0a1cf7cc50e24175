"""What a state is told apart by, and numbers of narrow types that are not finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergekit_ot import CheckpointError, MemoryStore
from mergekit_ot.storage.finite import check_finite

_ZEROS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "other",
    [
        {"weight": _ZEROS.reshape(3, 2)},
        {"weight": _ZEROS.to(torch.int32)},
        {"bias": _ZEROS},
        {"weight": _ZEROS, "bias": torch.zeros(0)},
        {"weight": _ZEROS.clone().fill_diagonal_(1)},
    ],
    ids=["shape", "type", "name", "another tensor", "entries"],
)
def test_the_digest_of_a_state_tells_it_from_every_other(other: dict[str, Tensor]) -> None:
    digest = MemoryStore({"weight": _ZEROS}).digest()
    assert digest == MemoryStore({"weight": torch.zeros(3, 2).T}).digest()
    assert digest != MemoryStore(other).digest()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_types_of_one_byte_are_looked_at_like_all_others(dtype: torch.dtype) -> None:
    check_finite({"weight": torch.ones(2).to(dtype)}, "a.pt")
    with pytest.raises(CheckpointError, match=r"'weight' of 'a.pt' has 1 of 2"):
        check_finite({"weight": torch.tensor([1.0, float("nan")]).to(dtype)}, "a.pt")
