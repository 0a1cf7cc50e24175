"""Front ends: three ways to one graph IR, their limits, and what each refuses."""

from __future__ import annotations

import time

import pytest
import torch
from architectures import samples
from torch import Tensor, nn
from unruled import twist

from mergekit_ot import ArchitectureError, TraceLimits, check_model, trace_model
from mergekit_ot.graph.capture.front_end import TraceLimitError

FRONT_ENDS = ("export", "make-fx", "symbolic")
# A spread of what the rules must read alike, however the program was captured.
SAME = [
    ("convolutional", "vgg"),
    ("convolutional", "resnet_bottleneck"),
    ("convolutional", "shufflenet_v1"),
    ("recurrent", "lstm_projected"),
    ("recurrent", "gru_two_bidirectional"),
    ("attention", "transformer_encoder"),
    ("mixed", "in_place"),
    ("mixed", "siamese_convolutional"),
]


@pytest.mark.parametrize(("which", "name"), SAME)
def test_every_front_end_finds_the_same_groups(which: str, name: str) -> None:
    sample = samples(which)[name]
    found = {end: trace_model(sample.make(), sample.inputs(), front_end=end) for end in FRONT_ENDS}
    layouts = {end: (dict(graph.layouts), sorted(graph.free_groups)) for end, graph in found.items()}
    assert layouts["make-fx"] == layouts["export"]
    assert layouts["symbolic"] == layouts["export"]


def test_symbolic_refuses_what_python_decides_on_a_shape() -> None:
    sample = samples("recurrent")["cells_loop"]
    with pytest.raises(ArchitectureError, match="symbolic: "):
        trace_model(sample.make(), sample.inputs(), front_end="symbolic")


def test_a_branch_on_data_falls_back_and_says_so() -> None:
    sample = samples("mixed")["data_dependent_branch"]
    with pytest.raises(ArchitectureError, match="export: "):
        trace_model(sample.make(), sample.inputs(), front_end="export")
    graph = trace_model(sample.make(), sample.inputs())
    assert any(
        remark.startswith("Captured by 'make-fx', since 'export' cannot") for remark in graph.diagnostics.remarks
    )


def test_an_unknown_front_end_is_refused_with_those_there_are() -> None:
    with pytest.raises(ArchitectureError, match="Known: auto, export, make-fx, symbolic"):
        trace_model(nn.Linear(2, 2), torch.randn(2, 2), front_end="dynamo")


class ViewWrite(nn.Module):
    """Writes into a slice of a tensor that is read as a whole later."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        buffer = torch.zeros_like(hidden)
        buffer[:, 1:4] = hidden[:, :3]
        return self.second(buffer)


def test_make_fx_refuses_a_write_into_a_view_that_export_makes_functional() -> None:
    with pytest.raises(ArchitectureError, match="memory that other values share"):
        trace_model(ViewWrite(), torch.randn(2, 3), front_end="make-fx")
    report = check_model(ViewWrite, torch.randn(2, 3))
    assert report.culprits == ()


class LateAlias(nn.Module):
    """Keeps a view from before a write and reads it afterwards: it sees the written values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        view = hidden.view(-1, 2, 3)
        hidden.mul_(2)
        return self.second(view.flatten(1))


def test_make_fx_refuses_a_view_that_outlives_a_write() -> None:
    with pytest.raises(ArchitectureError, match="memory that other values share"):
        trace_model(LateAlias(), torch.randn(2, 3), front_end="make-fx")


class Unrolled(nn.Module):
    """A loop in Python, one step per operation."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.inner, self.steps = nn.Linear(4, 4), steps

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.steps):
            x = torch.tanh(self.inner(x))
        return x


@pytest.mark.parametrize("front_end", ["export", "make-fx"])
def test_a_trace_that_explodes_is_stopped_by_size(front_end: str) -> None:
    limits = TraceLimits(operations=500)
    with pytest.raises(TraceLimitError, match=r"'Unrolled' was stopped at the limit of 500 operations"):
        trace_model(Unrolled(100_000), torch.randn(2, 4), front_end=front_end, limits=limits)
    assert torch.is_grad_enabled()
    assert len(trace_model(Unrolled(2), torch.randn(2, 4), front_end=front_end, limits=limits).operations) > 4


def test_a_trace_that_explodes_is_stopped_by_time() -> None:
    start = time.monotonic()
    with pytest.raises(TraceLimitError, match=r"limit of 0\.5 s"):
        trace_model(Unrolled(10_000_000), torch.randn(2, 4), limits=TraceLimits(seconds=0.5, operations=10**9))
    # Far below what ten million steps would take; no statement on speed.
    assert time.monotonic() - start < 120


def test_a_recorded_tensor_is_pinned_even_where_it_happens_to_be_constant() -> None:
    class Blind(nn.Module):
        """What goes through NumPy is recorded as a constant, here the same number for every neuron."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.from_numpy(self.first(x).detach().numpy()).clamp(0, 0)
            return self.second(hidden)

    report = check_model(Blind, torch.randn(2, 3))
    assert (report.groups, report.preserved) == (0, None)


def test_paths_of_modules_reach_a_recording() -> None:
    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return twist(x)

    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), Unknown()), nn.Linear(4, 2))
    (sentence,) = trace_model(model, torch.randn(2, 3), front_end="make-fx").diagnostics.unknown_operations
    assert "'1.1'" in sentence
