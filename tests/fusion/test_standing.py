"""An average of sources as they stand: the same to the bit with and without a trace, and traced where it must be."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from nets import NETS
from torch import Tensor, nn

from mergekit_ot import (
    FusionInputs,
    FusionOptions,
    SolverError,
    SourceModel,
    fuse,
    trace_model,
)
from mergekit_ot.fusion import standing
from mergekit_ot.fusion.engine import run_fusion
from mergekit_ot.fusion.setup import FusionSetup
from mergekit_ot.hooks.manager import default_manager
from mergekit_ot.hooks.preparing import prepare
from mergekit_ot.jobs.fusing import run_fuse
from mergekit_ot.recipe import FusionRecipe

INPUTS = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """A layer under two names, one that is never read, a number of steps, and weights of half precision."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.unread = nn.Linear(6, 2)
        self.last = nn.Linear(6, 3)
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("table", torch.arange(6))
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x[..., self.table]))
        return self.last(torch.relu(self.again(x))) * self.scale


class Half(Tied):
    def __init__(self) -> None:
        super().__init__(torch.bfloat16)


class Spread(nn.Module):
    """Attention without rules of its own: two networks with equal shapes and other heads."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.inner, self.last = heads, nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        values = torch.relu(self.inner(x)).unflatten(-1, (self.heads, -1))
        return self.last(values.softmax(-1).flatten(-2))


def setup_of(make: Callable[[], nn.Module], inputs: object, weights: tuple[float, ...], **given: object) -> FusionSetup:
    torch.manual_seed(0)
    states = []
    for number in range(len(weights)):
        state = make().state_dict()
        # A file may hold anything under the names of a layer that stands twice, and other whole numbers.
        others = [name for name in state if name == "steps" or name.startswith("again.")]
        states.append({**state, **{name: state[name] + number + 1 for name in others}})
    sources = [SourceModel(f"{number}.pt", make, state) for number, state in enumerate(states)]
    options = FusionOptions(solver="average", model_weights=weights, device="cpu", **given)  # type: ignore[arg-type]
    return prepare(FusionInputs(sources, example_inputs=inputs), options, default_manager(), trace_model)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.0, 0.7), (1 / 3, 1 / 3, 1 / 3)])
@pytest.mark.parametrize("make", [Tied, Half])
def test_an_average_is_the_same_to_the_bit_without_a_trace(
    make: Callable[[], nn.Module], weights: tuple[float, ...]
) -> None:
    inputs = INPUTS.to(next(make().parameters()).dtype)
    setup = setup_of(make, inputs, weights)
    assert setup.needs_no_graph
    found = run_fusion(setup)
    assert not found.is_traced
    expected = run_fusion(replace(setup, needs_no_graph=False))
    assert list(found.state) == list(expected.state)
    for name, value in expected.state.items():
        assert found.state[name].dtype == value.dtype
        assert torch.equal(found.state[name], value), name
    assert found.check == expected.check
    assert found.aligned_sources_max_error == expected.aligned_sources_max_error == 0


@pytest.mark.parametrize("name", NETS)
def test_every_network_is_averaged_the_same_with_and_without_a_trace(name: str) -> None:
    net = NETS[name]
    setup = setup_of(net.make, net.inputs, (0.25, 0.75))
    if not setup.needs_no_graph:
        # Which buffers are averaged is known from a trace alone.
        kept = {key for key, value in net.make().state_dict().items() if value.is_floating_point()}
        assert kept - {key for key, _ in net.make().named_parameters(remove_duplicate=False)}
        return
    found, expected = run_fusion(setup), run_fusion(replace(setup, needs_no_graph=False))
    assert all(torch.equal(found.state[key], value) for key, value in expected.state.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_parts_of_a_tensor_are_averaged_as_the_whole_is(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    make = lambda: nn.Sequential(nn.Linear(61, 83), nn.ReLU(), nn.Linear(83, 7)).to(dtype)  # noqa: E731
    setup = setup_of(make, torch.randn(2, 61, dtype=dtype), (0.2, 0.3, 0.5))
    monkeypatch.setattr(standing, "PART", 64)
    found, expected = run_fusion(setup), run_fusion(replace(setup, needs_no_graph=False))
    assert all(torch.equal(found.state[name], value) for name, value in expected.state.items())


def test_what_only_a_graph_tells_is_found_when_it_is_asked_for() -> None:
    setup = setup_of(Tied, INPUTS, (0.5, 0.5))
    found, expected = run_fusion(setup), run_fusion(replace(setup_of(Tied, INPUTS, (0.5, 0.5)), needs_no_graph=False))
    assert not found.is_traced
    assert found.groups == expected.groups
    assert found.is_traced
    assert found.extent == expected.extent
    assert found.plan.describe() == expected.plan.describe()
    assert found.alignment.couplings.keys() == expected.alignment.couplings.keys()
    moved = found.aligned_state(1)
    assert all(torch.equal(moved[name], value) for name, value in expected.aligned_state(1).items())


def test_no_trace_is_made_for_an_average() -> None:
    nets = [nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2)]
    with patch("mergekit_ot.hooks.tracing.trace", side_effect=AssertionError("traced")):
        result = fuse(nets, solver="average", example_inputs=INPUTS)
    assert torch.equal(result.state["0.weight"], nets[0][0].weight * 0.5 + nets[1][0].weight * 0.5)  # type: ignore[union-attr]


@pytest.mark.parametrize("buffer", [torch.ones(8), torch.ones(8, dtype=torch.bool)])
def test_buffers_that_may_be_averaged_are_looked_at_in_a_trace(buffer: Tensor) -> None:
    class Buffered(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
            self.register_buffer("kept", buffer)

    assert not setup_of(Buffered, INPUTS, (0.5, 0.5)).needs_no_graph


def test_another_architecture_is_refused_as_before() -> None:
    with pytest.raises(SolverError, match=r"sizes \[3, 4\] for a fused size of 3"):
        fuse([Spread(3), Spread(4)], solver="average", example_inputs=INPUTS)
    wide = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    narrow = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(SolverError, match=r"takes neurons as they stand, and group '0\.weight:0' has sizes \[9, 8\]"):
        fuse([wide, narrow], solver="average", example_inputs=INPUTS)


def test_nan_in_a_source_is_refused(tmp_path: Path) -> None:
    nets = [nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2)]
    paths = []
    for number, net in enumerate(nets):
        state = {name: value.clone() for name, value in net.state_dict().items()}
        if number:
            state["2.weight"][1, 2] = float("nan")
        paths.append(str(tmp_path / f"{number}.pt"))
        torch.save(state, paths[-1])
    code = tmp_path / "standing_net.py"
    code.write_text(
        "from torch import nn\n\n\ndef make():\n    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))\n"
    )
    recipe = FusionRecipe(
        models=paths, arch=[f"{code}:make"], input_shape=(6,), output=str(tmp_path / "fused.pt"), solver="average"
    )
    with pytest.raises(Exception, match=r"Tensor '2\.weight' of '.*1\.pt' has 1 of 24 entries that are NaN"):
        run_fuse(recipe, default_manager(), lambda _: None)
    assert not (tmp_path / "fused.pt").exists()
    torch.save(nets[1].state_dict(), paths[1])
    outcome = run_fuse(recipe, default_manager(), lambda _: None)
    found = outcome.as_json()
    assert not outcome.result.is_traced
    assert (found["groups"], found["aligned_groups"], found["neuron_groups"]) == ([], 0, None)
    assert json.dumps(found)
    # Whatever needs the groups has them.
    assert outcome.result.extent.groups == 1
    assert outcome.as_json()["neuron_groups"] == 1
    assert outcome.as_json().keys() == found.keys()
