"""What a group shows of itself: which tensors are in scope, in which units, and how it refers to itself."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from nets import Mlp, ResNet
from torch import Tensor, nn

from mergekit_ot import Coupling, GroupView, Permutation, Scope, trace_model
from mergekit_ot.fusion.alignment import Alignment

FIRST, SECOND = "layers.0.weight:0", "layers.1.weight:0"


def view_of(
    models: list[nn.Module], group: str, scope: Scope, aligned: Mapping[str, tuple[Coupling, ...]], inputs: Tensor
) -> GroupView:
    graphs = tuple(trace_model(model, inputs) for model in models)
    states = [model.state_dict() for model in models]
    return GroupView(group, Alignment(graphs, graphs[0], aligned), scope, lambda source, name: states[source][name])


def identity(size: int, count: int = 1) -> tuple[Coupling, ...]:
    return (Permutation.identity(size),) * count


def test_in_incoming_scope_readers_say_nothing_even_where_they_are_aligned() -> None:
    model = Mlp((6, 8, 5, 3))
    given = [model], SECOND
    aligned = {FIRST: identity(8)}
    inputs = torch.randn(2, 6)
    incoming = view_of(*given, Scope.INCOMING, aligned, inputs).weights(0)
    incident = view_of(*given, Scope.INCIDENT, aligned, inputs).weights(0)
    # Its own rows and bias; the reader's other axis is the model's output, which is aligned from the start.
    assert torch.equal(incoming, torch.cat([model.layers[1].weight, model.layers[1].bias[:, None]], 1))
    assert torch.equal(incident, torch.cat([incoming, model.layers[2].weight.T], 1))


@pytest.mark.parametrize("scope", list(Scope))
def test_a_tensor_takes_part_when_its_other_axes_are_aligned(scope: Scope) -> None:
    model = Mlp((6, 8, 5, 3))
    inputs = torch.randn(2, 6)
    readers = 3 if scope is Scope.INCIDENT else 0
    assert view_of([model], SECOND, scope, {}, inputs).weights(0).shape == (5, 1 + readers)
    assert view_of([model], SECOND, scope, {FIRST: identity(8)}, inputs).weights(0).shape == (5, 8 + 1 + readers)


def test_rows_are_expressed_in_the_fused_order_of_the_group_behind() -> None:
    model = Mlp((6, 8, 5, 3))
    order = torch.tensor([3, 1, 0, 2, 7, 4, 6, 5])
    aligned = {FIRST: (Permutation.identity(8), Permutation(order))}
    view = view_of([model, model], SECOND, Scope.INCOMING, aligned, torch.randn(2, 6))
    assert torch.equal(view.weights(1)[:, :8], model.layers[1].weight[:, order])


def test_a_neuron_and_its_halves_look_alike_to_those_who_compare_readers() -> None:
    """Doubled neurons are read by halves; as densities over their group that is the same."""
    small, large = Mlp((6, 8, 5, 3)), Mlp((6, 8, 10, 3))
    state = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    state["layers.1.weight"] = state["layers.1.weight"].repeat_interleave(2, 0)
    state["layers.1.bias"] = state["layers.1.bias"].repeat_interleave(2, 0)
    state["layers.2.weight"] = state["layers.2.weight"].repeat_interleave(2, 1) / 2
    large.load_state_dict(state)
    inputs = torch.randn(4, 6)
    torch.testing.assert_close(large(inputs), small(inputs))
    view = view_of([small, large], SECOND, Scope.INCIDENT, {FIRST: identity(8, 2)}, inputs)
    torch.testing.assert_close(view.weights(1), view.weights(0).repeat_interleave(2, 0))


class Stream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.last(x + torch.tanh(self.inner(x)))


def test_the_structure_has_the_neurons_that_are_made_as_rows() -> None:
    model = Stream()
    view = view_of([model], "first.weight:0", Scope.INCOMING, {}, torch.randn(2, 4))
    structure = view.structure(0)
    assert structure is not None
    assert torch.equal(structure, model.inner.weight[None])
    # A square map stands in the structure alone.
    assert view.weights(0).shape == (6, 4 + 1 + 1)


def test_running_statistics_are_no_description_of_a_neuron() -> None:
    model = ResNet().eval()
    inputs = torch.randn(2, 3, 8, 8)
    key = "conv1.weight:0"
    before = view_of([model], key, Scope.INCOMING, {}, inputs).weights(0)
    model.bn1.running_mean.normal_()
    model.bn1.running_var.uniform_(0.5, 2)
    assert torch.equal(view_of([model], key, Scope.INCOMING, {}, inputs).weights(0), before)
