"""Invertible inner spaces and positive scales: which groups have them, by hand, and that nothing else is certified."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attentions import NormedHeads, OneBlock
from rotating import MODELS, ROWS, Decoder, Heads
from torch import Tensor, nn

from mergekit_ot import Invertible, PositiveScale, check_model, default_manager, trace_model
from mergekit_ot.graph.symmetry.planted import PlantedProof, planted_change
from mergekit_ot.graph.symmetry.proof import SENSITIVITY, TOLERANCE, Proof
from mergekit_ot.hooks import checking
from mergekit_ot.testing import check_symmetry

Make = Callable[[], nn.Module]

SPACES: dict[str, tuple[Make, Tensor, int]] = {
    # Of each layer: queries with keys, values with outputs.
    "gpt": (*MODELS["gpt"], 4),
    # Rotary positions leave values alone.
    "llama": (*MODELS["llama"], 2),
    "gains behind queries and keys": (lambda: OneBlock(NormedHeads(True)), ROWS, 1),
    # Without gains queries may rotate, and no more.
    "norms behind queries and keys": (lambda: OneBlock(NormedHeads(False)), ROWS, 1),
    "grouped queries": (lambda: OneBlock(Heads(True, False, 2)), ROWS, 2),
    "no heads": (lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)), ROWS, 0),
}


@pytest.mark.parametrize("name", SPACES)
def test_inner_spaces_may_be_mixed_by_any_invertible_map(name: str) -> None:
    make, inputs, count = SPACES[name]
    assert len(check_symmetry("invertible", make, inputs, groups=count)) == count


def test_without_their_inverse_queries_and_keys_change_the_function() -> None:
    make, inputs, _ = SPACES["gpt"]
    graph = trace_model(make(), inputs)
    proof = PlantedProof(make, (inputs,), graph=graph)
    (draw, *_) = proof.draws_of(Invertible())
    places = Invertible().find(graph, proof)
    for key, where in places.items():
        assert {power for (power,) in where.values()} == {1, -1}
        same = {key: dict.fromkeys(where, (1,))}
        assert planted_change(draw, Invertible(), graph, {key: where}) <= TOLERANCE
        assert planted_change(draw, Invertible(), graph, same) > SENSITIVITY * TOLERANCE


def test_a_check_names_the_largest_kind_first() -> None:
    report = check_model(lambda: OneBlock(Heads(True)), ROWS)
    held = {row["name"]: row["symmetries"] for row in report.rows}
    assert held["heads.v.weight:0.1"] == ["order", "invertible", "orthogonal"]
    assert held["embed.weight:0"] == ["order", "orthogonal", "sign"]


def layers(activation: Make, *norm: Callable[[int], nn.Module]) -> nn.Module:
    norms = [[each(width) for each in norm] for width in (6, 5)]
    first, second = nn.Linear(4, 6), nn.Linear(6, 5)
    return nn.Sequential(first, *norms[0], activation(), second, *norms[1], activation(), nn.Linear(5, 3))


class Stream(nn.Module):
    """A stream that a branch with a ReLU reads behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.up, self.down, self.head = nn.Linear(6, 7), nn.Linear(7, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.norm(x + self.down(torch.relu(self.up(self.norm(x))))))


POINTS = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
PICTURES = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(3))
BOTH = {"0.weight:0", "2.weight:0"}


def convolutions(*norm: Callable[[int], nn.Module]) -> nn.Module:
    body = nn.Conv2d(2, 5, 3), *(each(5) for each in norm), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(45, 2))


SCALED: dict[str, tuple[Make, Tensor, set[str]]] = {
    "relu": (lambda: layers(nn.ReLU), POINTS, BOTH),
    "leaky relu": (lambda: layers(nn.LeakyReLU), POINTS, BOTH),
    "prelu": (lambda: nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 3)), POINTS, {"0.weight:0"}),
    "tanh": (lambda: layers(nn.Tanh), POINTS, set()),
    "gelu": (lambda: layers(nn.GELU), POINTS, set()),
    "relu6": (lambda: layers(nn.ReLU6), POINTS, set()),
    "relu, then tanh": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
        POINTS,
        {"0.weight:0"},
    ),
    "layer norm": (lambda: layers(nn.ReLU, nn.LayerNorm), POINTS, {"0.weight:0", "3.weight:0"}),
    "layer norm without gains": (
        lambda: layers(nn.ReLU, lambda width: nn.LayerNorm(width, elementwise_affine=False)),
        POINTS,
        set(),
    ),
    "batch norm": (lambda: convolutions(nn.BatchNorm2d), PICTURES, {"0.weight:0"}),
    "convolutions": (convolutions, PICTURES, {"0.weight:0"}),
    "a branch": (Stream, POINTS, {"up.weight:0"}),
}


@pytest.mark.parametrize("name", SCALED)
def test_positive_scales_are_found_in_front_of_homogeneous_activations(name: str) -> None:
    make, inputs, expected = SCALED[name]
    assert set(check_symmetry("positive scale", make, inputs, groups=len(expected))) == expected


@pytest.mark.parametrize("name", [name for name, (_, _, expected) in SCALED.items() if expected])
def test_scales_of_readers_alone_and_negative_ones_change_the_function(name: str) -> None:
    class AnyScale(PositiveScale):
        def draw(self, size: int, generator: torch.Generator) -> Tensor:
            return -super().draw(size, generator)

    make, inputs, _ = SCALED[name]
    graph = trace_model(make(), inputs)
    proof = PlantedProof(make, (inputs,))
    draw = Proof(make, (inputs,), 0)
    for key, places in PositiveScale().find(graph, proof).items():
        readers = {place: powers for place, powers in places.items() if powers == (-1,)}
        assert planted_change(draw, PositiveScale(), graph, {key: places}) <= TOLERANCE
        assert planted_change(draw, PositiveScale(), graph, {key: readers}) > SENSITIVITY * TOLERANCE
        assert planted_change(draw, AnyScale(), graph, {key: places}) > SENSITIVITY * TOLERANCE


def test_behind_a_norm_gains_and_biases_make_the_neurons() -> None:
    make, inputs, _ = SCALED["batch norm"]
    (places,) = check_symmetry("positive scale", make, inputs).values()
    assert {name for (name, _), powers in places.items() if powers == (1,)} == {"1.weight", "1.bias"}
    assert {name for (name, _), powers in places.items() if powers == (-1,)} == {"5.weight"}


@pytest.mark.parametrize("make_and_inputs", [(lambda: Decoder(layers=1), MODELS["gpt"][1]), (Stream, POINTS)])
def test_a_check_runs_little_more_than_without_them(
    make_and_inputs: tuple[Make, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    run, known = Proof.run, checking.required_symmetries
    monkeypatch.setattr(Proof, "run", lambda self, state: runs.append(1) or run(self, state))
    counts = []
    for left_out in ({"invertible", "positive scale"}, set()):
        kept = [each for each in known(default_manager()) if each.name not in left_out]
        monkeypatch.setattr(checking, "required_symmetries", lambda _, kept=kept: kept)
        runs.clear()
        check_model(*make_and_inputs)
        counts.append(len(runs))
    assert counts[0] < counts[1] <= 1.5 * counts[0], counts
