"""What a model hands out: the tensors in any object are its output, and an output without one is refused."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributions, nn

from mergekit_ot import ArchitectureError, SourceModel, check_model, fuse, outputs_of, tensors_of, trace_model


class Handing(nn.Module):
    """A perceptron that hands out its result in something else."""

    def __init__(self, hand: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.last, self.hand = nn.Linear(4, 8), nn.Linear(8, 2), hand

    def forward(self, inputs: Tensor) -> Any:
        return self.hand(self.last(torch.relu(self.first(inputs))))


@dataclasses.dataclass(slots=True)
class Slotted:
    logits: Tensor
    count: int = 3


class Circular:
    def __init__(self, value: Tensor) -> None:
        self._value, self.itself, self.kept = value, self, "text"


def each(value: Tensor) -> Iterator[Tensor]:
    yield value
    yield value + 1


def mixture(value: Tensor) -> distributions.Distribution:
    parts = distributions.Normal(value, value.exp())
    return distributions.MixtureSameFamily(distributions.Categorical(logits=value), parts)


def squashed(value: Tensor) -> distributions.Distribution:
    return distributions.TransformedDistribution(distributions.Normal(value, 1.0), [distributions.TanhTransform()])


HANDS = {
    "categorical": lambda value: distributions.Categorical(logits=value),
    "mixture": mixture,
    "squashed": squashed,
    "slotted": Slotted,
    "circular": Circular,
    "generator": each,
    "mapping": lambda value: collections.UserDict(policy=[value, None, "text"]),
    "complex": lambda value: torch.complex(value, value * 2),
    "packed": lambda value: nn.utils.rnn.pack_padded_sequence(value[None], torch.tensor([3]), batch_first=True),
}


@pytest.mark.parametrize("name", HANDS)
def test_the_tensors_in_any_output_are_the_output(name: str) -> None:
    net, inputs = Handing(HANDS[name]), torch.randn(3, 4)
    graph = trace_model(net, inputs)
    assert list(graph.free_groups) == ["first.weight:0"]
    assert not graph.diagnostics.unknown_operations
    assert outputs_of(net.eval(), [inputs])


def test_a_model_that_hands_out_a_distribution_is_certified() -> None:
    report = check_model(lambda: Handing(mixture), torch.randn(3, 4), trials=1)
    assert (report.groups, report.certified, report.preserved) == (1, 1, True)


@pytest.mark.parametrize("hand", [lambda value: None, lambda value: [1, "text"], lambda value: lambda: value])
def test_an_output_without_a_tensor_is_refused(hand: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ArchitectureError, match="The output of Handing holds no tensor"):
        fuse([Handing(hand), Handing(hand)], example_inputs=torch.randn(3, 4))


def test_an_output_that_depends_on_no_parameter_is_refused() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            self.layer(inputs)
            return inputs * 2

    with pytest.raises(ArchitectureError, match=r"depends on none of its 2 parameters \(the first is 'layer.weight'\)"):
        fuse([Aside(), Aside()], example_inputs=torch.randn(3, 4))


def test_a_model_in_an_output_is_no_output() -> None:
    net = nn.Linear(2, 2)
    assert tensors_of({"model": net, "value": torch.zeros(1)})[0].shape == (1,)
    assert len(tensors_of({"model": net, "value": torch.zeros(1)})) == 1


def test_a_policy_fused_with_its_planted_copy_returns_its_distribution() -> None:
    torch.manual_seed(0)
    make = lambda: Handing(HANDS["categorical"])  # noqa: E731
    net, order = make(), torch.randperm(8)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    planted = {**state, "last.weight": state["last.weight"][:, order]}
    planted |= {name: state[name][order] for name in ("first.weight", "first.bias")}
    sources = [SourceModel("a", make, state), SourceModel("b", make, planted)]
    inputs = torch.randn(3, 4)
    result = fuse(sources, solver="weight-matching", example_inputs=inputs)
    fused, own = outputs_of(result.model(), [inputs])[0], outputs_of(net.eval(), [inputs])[0]
    assert torch.allclose(fused, own, atol=1e-6)
    assert result.aligned_sources_max_error is not None
    assert result.aligned_sources_max_error < 1e-5


class Noisy(nn.Module):
    """Adds noise to its neurons: the same to all, or to each its own."""

    def __init__(self, is_per_neuron: bool) -> None:
        super().__init__()
        self.first, self.last, self.is_per_neuron = nn.Linear(4, 8), nn.Linear(8, 2), is_per_neuron

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.first(inputs))
        noise = torch.randn_like(hidden) if self.is_per_neuron else torch.randn(hidden.shape[0], 1)
        return self.last(hidden + noise)


def test_models_that_draw_random_numbers_draw_the_same_ones_where_they_are_compared() -> None:
    result = fuse([Noisy(False), Noisy(False)], example_inputs=torch.randn(3, 4))
    assert len(result.groups) == 1
    assert result.aligned_sources_max_error is not None
    assert result.aligned_sources_max_error < 1e-5
    assert not result.warnings


def test_comparing_leaves_the_callers_random_numbers_alone() -> None:
    net = Noisy(True)
    torch.manual_seed(5)
    wanted = torch.randn(3)
    torch.manual_seed(5)
    outputs_of(net, [torch.zeros(3, 4)])
    assert torch.equal(torch.randn(3), wanted)


def test_a_number_drawn_per_neuron_holds_the_neurons_in_place_and_says_so() -> None:
    report = check_model(lambda: Noisy(True), torch.randn(3, 4))
    assert report.groups == 0
    assert any("random numbers are drawn per neuron" in pin for pin in report.pins)
    assert not report.warnings
    assert not report.culprits
