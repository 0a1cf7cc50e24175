"""The planted-order law: reorder every group and the function stays; move one member alone and it does not."""

import pytest
import torch
from nets import NETS
from torch import nn

from mergekit_ot import check_model, trace_model
from mergekit_ot.graph.layouts import IN, OUT
from mergekit_ot.graph.symmetry.permutation import random_orders, reorder_state


@pytest.mark.parametrize("name", NETS)
def test_every_group_that_was_counted_by_hand_is_found_and_certified(name: str) -> None:
    net = NETS[name]
    report = check_model(net.make, net.inputs)
    assert (report.groups, report.families) == (net.groups, net.families)
    assert report.certified == net.groups
    assert report.preserved is True
    assert report.culprits == ()
    assert report.max_error is not None
    assert report.max_error <= 1e-10


@pytest.mark.parametrize("name", NETS)
def test_orders_move_every_parameter_that_holds_a_group(name: str) -> None:
    """A reorder that does nothing would pass the law above; each parameter with a free group must really change."""
    net = NETS[name]
    model = net.make()
    graph = trace_model(model, net.inputs)
    state = {key: torch.randn(value.shape) for key, value in model.state_dict().items() if value.is_floating_point()}
    moved = reorder_state(state, graph, random_orders(graph, torch.Generator().manual_seed(0)))
    for parameter in {slot.parameter for group in graph.free_groups.values() for slot in group.members}:
        assert not torch.equal(moved[parameter], state[parameter])
        assert torch.equal(moved[parameter].flatten().sort().values, state[parameter].flatten().sort().values)


def test_a_model_without_free_groups_says_nothing_found_never_preserved() -> None:
    report = check_model(lambda: nn.Linear(4, 3), torch.randn(2, 4))
    assert (report.groups, report.certified, report.preserved, report.max_error) == (0, 0, None, None)


def test_a_group_whose_partial_move_changes_nothing_is_not_certified() -> None:
    class Difference(nn.Module):
        """The bias cancels, so moving the weight without it is no change: nothing proves the group."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(3, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.encoder(x) - self.encoder(x + 1)).square().sum(1)

    report = check_model(Difference, torch.randn(2, 3))
    assert (report.groups, report.certified, report.preserved) == (1, 0, True)


def test_roles_say_who_owns_and_who_reads() -> None:
    graph = trace_model(NETS["cnn"].make(), NETS["cnn"].inputs)
    group = graph.groups["conv2.weight:0"]
    roles = {(slot.parameter, slot.axis): slot.role for slot in group.members}
    assert roles[("conv2.weight", 0)] == OUT
    assert roles[("norm2.running_mean", 0)] == OUT
    assert roles[("fc1.weight", 1)] == IN


def test_group_keys_do_not_depend_on_width() -> None:
    from nets import ResNet

    narrow = trace_model(ResNet(4), NETS["resnet_b"].inputs)
    wide = trace_model(ResNet(6), NETS["resnet_b"].inputs)
    assert set(narrow.free_groups) == set(wide.free_groups)
    narrow.check_same_structure(wide, "narrow", "wide")


def test_no_instance_is_run_before_it_is_captured_and_every_forward_runs_on_a_fresh_one() -> None:
    made: list[nn.Module] = []

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            self.runs = 0
            made.append(self)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.runs += 1
            return self.inner(x)

    assert check_model(Counting, torch.randn(2, 3)).preserved is True
    assert all(instance.runs <= 1 for instance in made)
    assert made[0].runs == 0


class GroupedStream(nn.Module):
    """A residual stream in three groups: its square map has groups, and neurons inside them, on both axes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 12), nn.GroupNorm(3, 12)
        self.inner, self.last = nn.Linear(12, 12), nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(x + torch.tanh(self.inner(self.norm(x))))


def test_members_of_a_family_follow_the_context_on_their_own_axis() -> None:
    report = check_model(GroupedStream, torch.randn(2, 4))
    # The groups, and the neurons inside each of the three.
    assert (report.groups, report.families, report.certified) == (2, 4, 2)
    assert (report.culprits, report.preserved) == ((), True)


def test_every_member_of_a_family_has_an_order_of_its_own() -> None:
    """And it stands at the place of its member: taken one member at a time, the function stays too."""
    graph = trace_model(NETS["mobile"].make(), NETS["mobile"].inputs)
    (family,) = [group for group in graph.free_groups.values() if group.context]
    orders = random_orders(graph, torch.Generator().manual_seed(0))[family.key]
    assert orders.shape == (5, 2)
    weight = torch.arange(10.0)
    outer = torch.tensor([4, 2, 0, 1, 3])
    inner = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [1, 0]])
    state = {"depthwise.bias": weight}
    moved = reorder_state(state, graph, {family.context[0]: outer, family.key: inner})["depthwise.bias"]
    expected = weight.reshape(5, 2)[outer].gather(1, inner).flatten()
    assert torch.equal(moved, expected)
