"""Sign symmetries: which groups have one, that it keeps the function, and that nothing else is certified."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from nets import NETS
from rotating import TOKENS, Decoder
from signed import (
    ROWS,
    SEQUENCES,
    CellLoop,
    Recurrent,
    TanhAttention,
    TanhStream,
    find_signs,
    layers,
    moved,
    random_couplings,
    randomised,
    relative_error,
    trace_once,
    traced,
)
from torch import Tensor, nn

from mergekit_ot import ModelGraph, Permutation, Places, Sign, trace_model
from mergekit_ot.graph.symmetry.planted import PlantedProof

YES, NO = (True,), (False,)
LSTM, GRU = (False, False, True, False), (False, False, True)

Case = tuple[Callable[[], nn.Module], Tensor, dict[str, tuple[bool, ...]]]

# Group → what its makers answer, for the groups that are to be found, by hand.
CASES: dict[str, Case] = {
    "tanh mlp": (lambda: layers(nn.Tanh(), nn.Tanh()), ROWS, {"0.weight:0": YES, "2.weight:0": YES}),
    "relu mlp": (lambda: layers(nn.ReLU(), nn.ReLU()), ROWS, {}),
    "sigmoid mlp": (lambda: layers(nn.Sigmoid(), nn.Sigmoid()), ROWS, {}),
    "tanh, then relu": (lambda: layers(nn.Tanh(), nn.ReLU()), ROWS, {"0.weight:0": YES}),
    "sigmoid, then tanh": (lambda: layers(nn.Sigmoid(), nn.Tanh()), ROWS, {"2.weight:0": YES}),
    "other odd functions": (
        lambda: layers(nn.Softsign(), nn.Hardtanh()),
        ROWS,
        {"0.weight:0": YES, "2.weight:0": YES},
    ),
    "gain before tanh": (
        lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.RMSNorm(5), nn.Tanh(), nn.Linear(5, 2)),
        ROWS,
        {"0.weight:0": YES},
    ),
    "layer norm before tanh": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2)),
        ROWS,
        {},
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 5, 3),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(5, 4, 2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(16, 2),
        ),
        torch.randn(3, 2, 8, 8),
        {"0.weight:0": YES, "3.weight:0": YES},
    ),
    "convolutions, max pool": (
        lambda: nn.Sequential(nn.Conv2d(2, 5, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(45, 2)),
        torch.randn(3, 2, 8, 8),
        {},
    ),
    "rnn": (lambda: Recurrent(nn.RNN), SEQUENCES, {"cell.weight_ih_l0:0": YES}),
    "rnn, relu": (lambda: Recurrent(nn.RNN, nonlinearity="relu"), SEQUENCES, {}),
    "lstm": (lambda: Recurrent(nn.LSTM), SEQUENCES, {"cell.weight_ih_l0:0.1": LSTM}),
    "gru": (lambda: Recurrent(nn.GRU), SEQUENCES, {"cell.weight_ih_l0:0.1": GRU}),
    "gru, two layers": (
        lambda: Recurrent(nn.GRU, num_layers=2),
        SEQUENCES,
        {"cell.weight_ih_l0:0.1": GRU, "cell.weight_ih_l1:0.1": GRU},
    ),
    "lstm, both directions": (
        lambda: Recurrent(nn.LSTM, bidirectional=True),
        SEQUENCES,
        {"cell.weight_ih_l0:0.1": LSTM, "cell.weight_ih_l0_reverse:0.1": LSTM},
    ),
    "lstm, projected": (
        lambda: Recurrent(nn.LSTM, proj_size=3),
        SEQUENCES,
        {"cell.weight_ih_l0:0.1": LSTM, "cell.weight_hr_l0:0": YES},
    ),
    "rnn cell": (lambda: CellLoop(nn.RNNCell), SEQUENCES, {"cell.weight_ih:0": YES}),
    "lstm cell": (lambda: CellLoop(nn.LSTMCell), SEQUENCES, {"cell.weight_ih:0.1": LSTM}),
    "gru cell": (lambda: CellLoop(nn.GRUCell), SEQUENCES, {"cell.weight_ih:0.1": GRU}),
    "residual stream": (TanhStream, ROWS, {"up.weight:0": YES}),
    # Its last group has no reader that could be negated alone, and so no proof.
    "siamese": (NETS["siamese"].make, torch.randn(2, 5), {"encoder.0.weight:0": YES}),
    # Heads and the spaces inside them are families; between two linear maps any neuron may be negated.
    "attention": (TanhAttention, torch.randn(2, 5, 6), {"head.weight:0": YES, "up.weight:0": YES}),
}
WITH_SIGNS = [name for name, (_, _, expected) in CASES.items() if expected]


def inputs_of(name: str) -> tuple[Tensor, ...]:
    return (CASES[name][1],) * (2 if name == "siamese" else 1)


@functools.cache
def found_in(name: str) -> tuple[ModelGraph, dict[str, Places]]:
    """The graph of a case and its signs, for all tests."""
    make = CASES[name][0]
    graph = trace_once(make(), inputs_of(name))
    return graph, find_signs(graph, make, inputs_of(name))


@pytest.mark.parametrize("name", CASES)
def test_the_groups_behind_an_odd_function_are_found_with_the_numbers_that_change(name: str) -> None:
    expected = CASES[name][2]
    graph, signs = found_in(name)
    assert set(signs) == set(expected)
    for key, answers in expected.items():
        assert set(signs[key]) == {(slot.parameter, slot.axis) for slot in graph.groups[key].members}
        for place, found in signs[key].items():
            is_gain = name == "gain before tanh" and place == ("1.weight", 0)
            is_reader = graph.roles[*place, key] == "IN"
            assert found == (NO if is_gain else YES if is_reader else answers), place


@pytest.mark.parametrize("name", WITH_SIGNS)
def test_neurons_in_another_order_and_negated_keep_the_function(name: str) -> None:
    graph, signs = found_in(name)
    for seed in range(2):
        model = randomised(CASES[name][0](), seed).double()
        # Families stand still with the groups that index them: a coupling of heads needs one of each member too.
        couplings = {
            key: coupling
            for key, coupling in random_couplings(graph, signs, seed).items()
            if name != "attention" or key in signs
        }
        copy = moved(model, graph, couplings, signs)
        assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))
        others = [torch.randn(2 * x.shape[0], *x.shape[1:], dtype=torch.float64) for x in inputs_of(name)]
        with torch.no_grad():
            torch.testing.assert_close(copy(*others), model(*others), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", WITH_SIGNS)
def test_negating_one_place_without_the_others_changes_the_function(name: str) -> None:
    graph, signs = found_in(name)
    model = randomised(CASES[name][0](), 0).double()
    others = [torch.randn(x.shape, dtype=torch.float64) for x in inputs_of(name)]
    for key, places in signs.items():
        size = graph.groups[key].size
        couplings = {key: Permutation(torch.arange(size), sign=-torch.ones(size))}
        for place, answers in places.items():
            alone = moved(model, graph, couplings, {key: {place: answers}})
            if any(answers):
                with torch.no_grad():
                    assert (alone(*others) - model(*others)).abs().max() > 1e-3, place


def test_a_convolution_of_one_channel_has_signs_too() -> None:
    _, signs = traced(
        lambda: nn.Sequential(nn.Conv2d(1, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(180, 2)), torch.randn(3, 1, 8, 8)
    )
    assert set(signs) == {"0.weight:0"}


class Dead(nn.Module):
    """What the tanh neurons send is multiplied by zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * self.second(torch.tanh(self.first(x)))


def test_neurons_that_nothing_depends_on_are_not_certified() -> None:
    graph, signs = traced(Dead, ROWS)
    assert list(graph.free_groups) == ["first.weight:0"]
    assert signs == {}


class Refusing(nn.Module):
    """Takes single precision alone, and says so in its own way."""

    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.error, self.first, self.second = error, nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.float32:
            raise self.error("not this kind")
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize(
    "error",
    [RuntimeError, ValueError, TypeError, AssertionError],
)
def test_a_model_that_cannot_run_in_double_precision_keeps_its_signs(error: type[Exception]) -> None:
    graph, signs = traced(lambda: Refusing(error), ROWS)
    assert list(graph.free_groups) == ["first.weight:0"]
    assert signs == {}


class SingleState(Recurrent):
    """Starts from a state of single precision, whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x, torch.zeros(1, x.shape[0], 5))[0].mean(1))


def test_a_model_that_makes_single_precision_is_proven_there() -> None:
    graph, signs = traced(lambda: SingleState(nn.RNN), SEQUENCES)
    assert set(signs) == {"cell.weight_ih_l0:0"}
    model = randomised(SingleState(nn.RNN), 3)
    copy = moved(model, graph, random_couplings(graph, signs, 0), signs)
    assert relative_error(copy, model, SEQUENCES) < 1e-5


@pytest.mark.parametrize("front_end", ["export", "make-fx"])
def test_gates_are_told_from_factors_whatever_a_front_end_calls_them(front_end: str) -> None:
    make = lambda: Decoder("llama", layers=1)  # noqa: E731
    graph = trace_model(make(), TOKENS, front_end=front_end)
    found = Sign().find(graph, PlantedProof(make, (TOKENS,)))
    gated = found["neurons.0.gate.weight:0"]
    assert gated["neurons.0.up.weight", 0] == gated["neurons.0.down.weight", 1] == (1,)
    assert gated["neurons.0.gate.weight", 0] == (0,)
