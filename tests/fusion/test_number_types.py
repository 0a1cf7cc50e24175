"""Sources of several number types are fused in the first one's; complex weights move like real ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mergekit_ot import SourceModel, fuse
from mergekit_ot.errors import CheckpointError


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def planted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    moved = {name: state[name][order] for name in ("0.weight", "0.bias")}
    return {**state, **moved, "2.weight": state["2.weight"][:, order]}


def source(name: str, state: dict[str, Tensor], kind: torch.dtype) -> SourceModel:
    return SourceModel(name, make, {key: value.to(kind) for key, value in state.items()})


SINGLE, DOUBLE, HALF = torch.float32, torch.float64, torch.float16
CASES = [
    ("average", SINGLE, DOUBLE),
    ("wb", SINGLE, DOUBLE),
    ("wb", DOUBLE, torch.bfloat16),
    ("gwb", HALF, SINGLE),
    ("otfusion", SINGLE, HALF),
    ("weight-matching", DOUBLE, SINGLE),
    ("activation-matching", HALF, DOUBLE),
]


@pytest.mark.parametrize(("solver", "first", "second"), CASES)
def test_sources_of_different_number_types_are_fused_in_the_first_ones(
    solver: str, first: torch.dtype, second: torch.dtype
) -> None:
    torch.manual_seed(0)
    state = make().state_dict()
    batch = torch.randn(20, 4)
    other = state if solver == "average" else planted(state)
    sources = [source("a.pt", state, first), source("b.pt", other, second)]
    result = fuse(sources, solver=solver, example_inputs=batch, data=[batch])
    assert {value.dtype for value in result.state.values()} == {first}
    assert torch.allclose(result.state["0.weight"].double(), state["0.weight"].double(), atol=4e-3)
    (note,) = result.notes
    assert note.startswith(f"b.pt holds {str(second).removeprefix('torch.')} where a.pt holds")


def test_modules_of_different_number_types_are_fused_too() -> None:
    result = fuse([make(), make().double()], example_inputs=torch.randn(2, 4))
    assert {value.dtype for value in result.state.values()} == {torch.float32}
    assert result.aligned_sources_max_error is not None
    assert result.aligned_sources_max_error < 1e-5


def test_whole_numbers_are_no_weights() -> None:
    sources = [source("a.pt", make().state_dict(), torch.float32), source("b.pt", make().state_dict(), torch.int64)]
    with pytest.raises(CheckpointError, match=r"'0.weight' of b.pt holds int64, and the architecture has float32"):
        fuse(sources, example_inputs=torch.randn(2, 4))


def test_complex_numbers_are_no_real_weights() -> None:
    sources = [source("a.pt", make().state_dict(), torch.cfloat)] * 2
    with pytest.raises(CheckpointError, match=r"'0.weight' of a.pt is complex \(complex64\)"):
        fuse(sources, example_inputs=torch.randn(2, 4))


class Spectral(nn.Module):
    """A layer on frequencies, whose weights are complex."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 8), nn.Linear(8, 1)
        self.mixing = nn.Parameter(torch.randn(8, 8, dtype=torch.cfloat) / 3)

    def forward(self, inputs: Tensor) -> Tensor:
        waves = torch.fft.rfft(self.first(inputs), dim=1)
        mixed = torch.einsum("bti,io->bto", waves, self.mixing)
        return self.last(torch.fft.irfft(mixed, n=inputs.shape[1], dim=1))


def of_spectral(state: dict[str, Tensor]) -> dict[str, Tensor]:
    ours, theirs = torch.randperm(8), torch.randperm(8)
    moved = {name: state[name][ours] for name in ("first.weight", "first.bias")}
    mixing = state["mixing"][ours][:, theirs]
    return {**state, **moved, "mixing": mixing, "last.weight": state["last.weight"][:, theirs]}


@pytest.mark.parametrize("solver", ["wb", "gwb", "activation-matching"])
def test_complex_weights_are_compared_and_moved(solver: str) -> None:
    torch.manual_seed(0)
    net, inputs = Spectral(), torch.randn(20, 6, 2)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    sources = [SourceModel("a", Spectral, state), SourceModel("b", Spectral, of_spectral(state))]
    result = fuse(sources, solver=solver, example_inputs=inputs, data=[inputs], refine=solver == "wb")
    assert len(result.groups) == 2
    run: Callable[[Tensor], Tensor] = result.model()
    with torch.no_grad():
        assert torch.allclose(run(inputs), net(inputs), atol=1e-5)
    assert result.state["mixing"].dtype is torch.cfloat
