"""`check_symmetry` passes our symmetries, and each clause fails a symmetry that breaks it alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nets import NETS
from signed import SEQUENCES, Recurrent, layers
from torch import Tensor, nn

from mergekit_ot import Block, Order, Sign
from mergekit_ot.errors import PluginError
from mergekit_ot.testing import check_symmetry

INPUTS = torch.randn(3, 4)


def tanh() -> nn.Module:
    return layers(nn.Tanh(), nn.Tanh())


@pytest.mark.parametrize("name", ["mlp", "cnn", "grouped", "attention", "resnet_a"])
def test_order_keeps_the_contract(name: str) -> None:
    net = NETS[name]
    assert len(check_symmetry("order", net.make, net.inputs, groups=net.groups)) == net.groups


@pytest.mark.parametrize(
    ("make", "inputs", "groups"),
    [
        (tanh, INPUTS, 2),
        (lambda: layers(nn.ReLU(), nn.Tanh()), INPUTS, 1),
        (lambda: layers(nn.ReLU(), nn.ReLU()), INPUTS, 0),
        (lambda: Recurrent(nn.LSTM), SEQUENCES, 1),
    ],
    ids=["tanh", "mixed", "relu", "lstm"],
)
def test_sign_keeps_the_contract(make: Callable[[], nn.Module], inputs: Tensor, groups: int) -> None:
    assert len(check_symmetry(Sign(), make, inputs, groups=groups)) == groups


class Restless(Sign):
    """Draws by a generator of its own."""

    def draw(self, size: int, generator: torch.Generator) -> Tensor:
        return torch.randn(size).sign().double()


class Idle(Sign):
    def draw(self, size: int, generator: torch.Generator) -> Tensor:
        return torch.ones(size, dtype=torch.float64)


class Writes(Sign):
    def act(self, block: Block, place: int, element: Tensor, power: int) -> Tensor:
        return block.view.copy_(super().act(block, place, element, power))


class Rounds(Sign):
    def act(self, block: Block, place: int, element: Tensor, power: int) -> Tensor:
        return super().act(block, place, element, power).float()


class Doubles(Sign):
    """Scales what makes neurons, and scales what reads them too."""

    def act(self, block: Block, place: int, element: Tensor, power: int) -> Tensor:
        return 2 * super().act(block, place, element, power)


class Elsewhere(Sign):
    def find(self, graph, proof):
        return {key: {**places, ("4.bias", 0): (1,)} for key, places in super().find(graph, proof).items()}


class Twice(Sign):
    def find(self, graph, proof):
        return {key: dict.fromkeys(places, (2,)) for key, places in super().find(graph, proof).items()}


class Pinned(Sign):
    def find(self, graph, proof):
        return {next(iter(graph.pinned_groups)): {}}


class Nowhere(Sign):
    def find(self, graph, proof):
        return {}


class Unproven(Sign):
    """Forgets the biases, and asks nobody."""

    def find(self, graph, proof):
        return {
            key: {place: (int(not place[0].endswith("bias")),) for place in group.places}
            for key, group in graph.free_groups.items()
        }


class Raises(Sign):
    def draw(self, size: int, generator: torch.Generator) -> Tensor:
        raise ArithmeticError("out of luck")


@pytest.mark.parametrize(
    ("symmetry", "told"),
    [
        (Restless(), "The same seed draws the same element"),
        (Idle(), "is not the identity"),
        (Writes(), "it wrote into the block"),
        (Rounds(), "it made torch.float32"),
        (Doubles(), "The sum over the neurons .* stays.*it changed by"),
        (Elsewhere(), r"group '0\.weight:0' does not stand on \[\('4\.bias', 0\)\]"),
        (Twice(), r"the powers of group '0\.weight:0' on .* are \(2,\)"),
        (Pinned(), "is no free group"),
        (Nowhere(), "none was found"),
        (Unproven(), r"the function changed with elements at 0\.weight:0, 2\.weight:0"),
        (Raises(), "the symmetry raised ArithmeticError: out of luck"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Sign) else "",
)
def test_each_clause_fails_a_symmetry_that_breaks_it(symmetry: Sign, told: str) -> None:
    with pytest.raises(PluginError, match=f"(?s)'sign' breaks its contract.*{told}"):
        check_symmetry(symmetry, tanh, INPUTS)


def test_the_number_of_groups_is_a_clause() -> None:
    with pytest.raises(PluginError, match=r"2 were found .*, not 1"):
        check_symmetry("sign", tanh, INPUTS, groups=1)


class Cancelled(nn.Module):
    """What the hidden neurons send is multiplied by zero: any order passes, and nothing proves one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * self.second(torch.relu(self.first(x)))


def test_neurons_that_nothing_depends_on_prove_nothing() -> None:
    with pytest.raises(PluginError, match="nothing in this model proves first"):
        check_symmetry(Order(), Cancelled, INPUTS)
