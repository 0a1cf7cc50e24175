"""What a forward writes into its own state: the next one must read it in the same order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mergekit_ot import trace_model


class Kept(nn.Module):
    """A parameter keeps hidden values, and the next forward reads them by a layer of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.read = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(6, 2)
        self.memory = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        known = self.read(self.memory)
        hidden = torch.tanh(self.first(x))
        with torch.no_grad():
            self.memory.copy_(hidden.mean(0))
        return self.last(hidden) + known


def test_what_is_written_into_a_parameter_has_its_order() -> None:
    torch.manual_seed(0)
    graph = trace_model(Kept(), torch.randn(2, 3))
    (group,) = graph.free_groups.values()
    places = {(slot.parameter, slot.axis) for slot in group.members}
    assert places == {("first.weight", 0), ("first.bias", 0), ("last.weight", 1), ("read.weight", 1), ("memory", 0)}


class Remembers(nn.Module):
    """A buffer keeps hidden values, and the next forward adds them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)
        self.register_buffer("before", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x)) + self.before
        self.before.copy_(hidden.mean(0))
        return self.last(hidden)


def test_what_is_kept_in_a_buffer_for_the_next_forward_is_pinned_by_the_trace() -> None:
    graph = trace_model(Remembers(), torch.randn(2, 3))
    assert not graph.free_groups
    assert "'before'" in str(graph.groups["first.weight:0"].pin)
