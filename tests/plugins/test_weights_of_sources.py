"""What a model weight says to a repair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mergekit_ot import fuse


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.last = nn.RNN(4, 10, batch_first=True), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(x)[0][:, -1])


@pytest.mark.slow
def test_states_of_a_source_that_hardly_counts_take_no_place_from_the_other() -> None:
    torch.manual_seed(2)
    nets = [Recurrent().eval() for _ in range(2)]
    data = torch.randn(200, 6, 4)
    result = fuse(nets, solver="wb", data=[data], repair="refit", model_weights=(0.05, 0.95), device="cpu")
    assert [note for note in result.notes if "10 neurons of 1 group: 0 from source 1, 10 from source 2" in note]
    assert result.repair_comparison is not None
    assert result.repair_comparison.repaired.plain < 0.2 * result.repair_comparison.unrepaired.plain
