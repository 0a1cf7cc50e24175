"""Rules for single layers: model weights of their own, over depth too, and solvers and measures of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import Mlp
from signed import traced_once
from torch import nn

from mergekit_ot import FusionResult, RecipeError, fuse

pytestmark = pytest.mark.usefixtures(traced_once.__name__)

INPUTS = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))


def pair() -> list[nn.Module]:
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(Mlp((6, 8, 5, 4, 3)).eval())
    return models


def fused(*layers: dict[str, Any], solver: str = "wb", **options: Any) -> FusionResult:
    return fuse(pair(), solver=solver, example_inputs=INPUTS, data=[(INPUTS,)], layers=layers, **options)


def shares_of(result: FusionResult, name: str) -> float:
    """How much of the second source is in a fused parameter."""
    first, second = (result.aligned_state(source)[name] for source in range(2))
    return float(((result.state[name] - first) * (second - first)).sum() / (second - first).square().sum())


@pytest.mark.parametrize("solver", ["average", "wb", "weight-matching"])
def test_weights_of_a_layer_are_those_of_its_mean_alone(solver: str) -> None:
    plain = fused(solver=solver)
    result = fused({"parameters": "layers.1.*", "weights": [1, 3]}, solver=solver)
    assert shares_of(result, "layers.1.weight") == pytest.approx(0.75, abs=1e-5)
    assert shares_of(result, "layers.1.bias") == pytest.approx(0.75, abs=1e-5)
    assert all(torch.equal(result.state[name], plain.state[name]) for name in plain.state if "layers.1." not in name)


def test_a_list_goes_linearly_from_the_first_layer_that_matches_to_the_last() -> None:
    result = fused({"parameters": "*", "weights": [[1, 0], [0, 1]]})
    found = [shares_of(result, f"layers.{number}.weight") for number in range(4)]
    assert found == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=1e-5)
    result = fused({"parameters": "layers.[123].*", "weights": [1, [0, 1, 0]]})
    found = [shares_of(result, f"layers.{number}.weight") for number in range(4)]
    assert found == pytest.approx([0.5, 0, 0.5, 0], abs=1e-5)


def test_one_hot_weights_are_that_source() -> None:
    result = fused({"parameters": "layers.0.*", "weights": [0, 1]})
    assert torch.equal(result.state["layers.0.weight"], result.aligned_state(1)["layers.0.weight"])
    kept = fused({"parameters": "layers.0.*", "keep": 1})
    assert torch.equal(kept.state["layers.0.weight"], result.state["layers.0.weight"])


def test_layers_have_solvers_and_measures_of_their_own() -> None:
    result = fused(
        {"parameters": "layers.0.*", "solver": "gwb"}, {"parameters": "layers.2.*", "solver": "activation-matching"}
    )
    assert [report.solver for report in result.groups] == ["gwb", "wb", "activation-matching"]
    own, all_alike = fused({"parameters": "*", "solver": "activation-matching"}), fused(solver="activation-matching")
    assert all(torch.equal(own.state[name], all_alike.state[name]) for name in own.state)
    seen, plain = fused({"parameters": "*", "measure": "activations"}), fused(measure="activations")
    assert all(torch.equal(seen.state[name], plain.state[name]) for name in seen.state)


def test_of_two_rules_for_the_neurons_of_a_layer_the_last_counts() -> None:
    result = fused({"parameters": "*", "solver": "gwb"}, {"parameters": "layers.1.*", "solver": "wb"})
    assert [report.solver for report in result.groups] == ["gwb", "wb", "gwb"]


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        ({"parameters": "layer.*", "weights": [1, 1]}, "No parameter matches"),
        ({"weights": [1, 1]}, "names its parameters by a GLOB"),
        ({"parameters": "*"}, "says one thing"),
        ({"parameters": "*", "weights": [1, 1], "keep": 0}, "says one thing"),
        ({"parameters": "*", "weigths": [1, 1]}, "has the key 'weigths'. It takes: parameters, keep, weights, solver"),
        ({"parameters": "*", "weights": [1]}, "are a list of 2"),
        ({"parameters": "*", "weights": [1, -1]}, "a number of at least zero"),
        ({"parameters": "*", "weights": [1, []]}, "a number of at least zero"),
        ({"parameters": "*", "weights": [[1, 0], 0]}, "all zero at 'layers.3"),
        ({"parameters": "*", "solver": "wbb"}, "Unknown solver 'wbb'"),
        ({"parameters": "*", "solver": "average"}, "couples nothing"),
        ({"parameters": "*", "measure": "weight"}, "Did you mean 'weights'"),
    ],
)
def test_what_does_not_fit_is_refused(rule: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        fused(rule)


def test_what_contradicts_itself_is_refused() -> None:
    with pytest.raises(RecipeError, match="kept from one model and has model weights"):
        fused({"parameters": "layers.0.*", "weights": [1, 1]}, keep=["layers.0.weight"])
    with pytest.raises(RecipeError, match="has no use: 'average' couples nothing"):
        fused({"parameters": "layers.0.*", "solver": "wb"}, solver="average")
