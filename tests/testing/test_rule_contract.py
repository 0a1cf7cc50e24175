"""`check_rule` passes our rules, one net per family of them, and each clause fails a rule that breaks it alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import mergeot_layers
import pytest
import torch
from nets import NETS
from torch import Tensor, nn
from torch.nn import functional as F

from mergekit_ot import EinRule, FunctionRule, NodeRule, OperationView, PluginManager, RuleError, hookimpl
from mergekit_ot.errors import PluginError
from mergekit_ot.testing import check_rule


class Between(nn.Module):
    """A function between two linear layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(3, 6), nn.Linear(6, 2), function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.function(self.first(inputs)))


def between(function: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Between(function)


INPUTS = torch.randn(2, 3)

# One net per family of rules: lines, broadcasting, movements, reductions.
FAMILIES = [
    ("aten.linear", "mlp"),
    ("aten.conv2d", "cnn"),
    ("aten.conv2d", "mobile"),
    ("aten.conv2d", "grouped"),
    ("aten.conv1d", "conv1d"),
    ("aten.conv3d", "conv3d"),
    ("aten.conv_transpose2d", "unet"),
    ("aten._native_batch_norm_legit_no_training", "resnet_b"),
    ("aten.group_norm", "grouped"),
    ("aten.layer_norm", "residual_mlp"),
    ("aten.max_pool2d", "cnn"),
    ("aten.clone", "attention"),
    ("tag:pointwise", "siamese"),
    ("tag:pointwise", "mobile"),
    ("aten.mean", "mobile"),
    ("aten.amax", "grouped"),
    ("aten.softmax", "attention"),
    ("aten.matmul", "attention"),
    ("aten.view", "attention"),
    ("aten.permute", "attention"),
    ("aten.unbind", "attention"),
    ("aten.view", "cnn"),
    ("aten.cat", "densenet"),
    ("aten.pad", "resnet_a"),
    ("aten.slice", "resnet_a"),
    ("aten.transpose", "shuffle"),
    ("aten.split", "shuffle"),
]


@pytest.mark.parametrize(
    ("rule", "net"),
    [
        pytest.param(rule, net, id=f"{rule}-{net}", marks=[pytest.mark.slow] if place % 2 else [])
        for place, (rule, net) in enumerate(FAMILIES)
    ],
)
def test_our_rules_keep_the_contract(rule: str, net: str) -> None:
    check_rule(rule, NETS[net].make, NETS[net].inputs, groups=NETS[net].groups)


PASSES = EinRule("* -> *", ("self",))


def forgets(operation: OperationView) -> list[list]:
    return [[operation.algebra.replicated(size) for size in shape] for shape in operation.output_shapes]


def raises(operation: OperationView) -> list[list]:
    raise RuleError("only on Sundays")


def breaks_down(operation: OperationView) -> list[list]:
    return [operation.arguments["no such argument"]]


def gives_other_sizes(operation: OperationView) -> list[list]:
    return [[*operation.labels("self"), operation.algebra.replicated(3)]]


def pins_everything(operation: OperationView) -> list[list]:
    labels = operation.labels("self")
    for label in labels:
        operation.algebra.pin(label, "to be safe")
    return [labels]


@pytest.mark.parametrize(
    ("rule", "clause"),
    [
        (PASSES, "The function stays.*it changed with the neurons of first.weight:0"),
        (FunctionRule(raises), "does not raise.*only on Sundays"),
        (FunctionRule(breaks_down), "does not raise.*no such argument"),
        (FunctionRule(gives_other_sizes), "labels have the sizes.*gives sizes"),
        (EinRule("* a b c -> * a b c", ("self",)), "labels have the sizes.*has 2 axes"),
        (FunctionRule(forgets), "Every axis of the inputs is in an output.*does not account for an axis of 6"),
        (FunctionRule(pins_everything), "one that reaches the operation.*may move: .*to be safe"),
    ],
)
def test_each_clause_fails_the_rule_that_breaks_it(rule: NodeRule, clause: str) -> None:
    with pytest.raises(PluginError, match=clause) as raised:
        check_rule(rule, between(lambda h: h.cumsum(1)), INPUTS, operation="aten.cumsum")
    assert "The rule for 'aten.cumsum' breaks its contract" in str(raised.value)


def test_a_right_rule_that_is_not_registered_passes() -> None:
    def along(operation: OperationView) -> list[list]:
        labels = operation.labels("self")
        (axis,) = operation.axes("self", "dim")
        operation.algebra.pin(labels[axis], "summed in order")
        return [labels]

    class Sequence(nn.Module):
        """Sums along the time axis, and leaves the neurons free."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(inputs)).cumsum(1))

    report = check_rule(FunctionRule(along), Sequence, torch.randn(2, 5, 3), operation="aten.cumsum")
    assert (report.groups, report.certified) == (1, 1)
    # Along the neurons the rule has to pin, and that is what the caller says.
    check_rule(FunctionRule(along), between(lambda h: h.cumsum(1)), INPUTS, operation="aten.cumsum", groups=0)


def test_a_rule_replaces_the_registered_one_of_its_operation() -> None:
    with pytest.raises(PluginError, match="no neuron that reaches the operation may move"):
        check_rule(FunctionRule(pins_everything), between(torch.relu), INPUTS, operation="aten.relu")


def test_the_expected_number_of_groups_is_compared() -> None:
    net = NETS["mlp"]
    with pytest.raises(PluginError, match=r"2 groups are free instead of 3: layers\.0\.weight:0, layers\.1\.weight:0"):
        check_rule("aten.linear", net.make, net.inputs, groups=3)


def test_a_model_that_does_not_use_the_operation_proves_nothing() -> None:
    with pytest.raises(PluginError, match=r"The model has an operation.*the traced model has none.*aten\.linear"):
        check_rule("aten.conv2d", NETS["mlp"].make, NETS["mlp"].inputs)


def test_free_groups_elsewhere_do_not_hide_that_the_operation_is_pinned() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))

        def forward(self, inputs: Tensor) -> Tensor:
            for number, layer in enumerate(self.layers):
                inputs = layer(inputs).cumsum(1) if number == 1 else F.relu(layer(inputs))
            return inputs

    with pytest.raises(PluginError, match="no neuron that reaches the operation may move"):
        check_rule(FunctionRule(pins_everything), Apart, torch.randn(2, 5), operation="aten.cumsum")


def test_a_model_that_cannot_tell_is_refused() -> None:
    class Difference(nn.Module):
        """The bias cancels, so that moving a member alone changes nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(3, 5)

        def forward(self, inputs: Tensor) -> Tensor:
            return (self.encoder(inputs) - self.encoder(inputs + 1)).square().sum(1)

    with pytest.raises(PluginError, match=r"nothing in this model proves encoder\.weight:0"):
        check_rule("aten.linear", Difference, INPUTS)


def test_a_rule_object_needs_its_operation_and_a_name_has_to_be_registered() -> None:
    with pytest.raises(PluginError, match="operation="):
        check_rule(PASSES, between(torch.relu), INPUTS)
    with pytest.raises(PluginError, match=r"Did you mean 'aten\.linear'"):
        check_rule("aten.linea", between(torch.relu), INPUTS)


def test_the_rules_of_the_given_manager_are_used() -> None:
    class Alone:
        @hookimpl
        def mergeot_symmetries(self) -> Mapping[str, str]:
            return mergeot_layers.mergeot_symmetries()

        @hookimpl
        def mergeot_node_rules(self) -> dict[str, NodeRule]:
            return {"aten.relu": PASSES}

    with pytest.raises(PluginError, match=r"no neuron that reaches the operation may move: .*no rule for"):
        check_rule("aten.relu", between(torch.relu), INPUTS, manager=PluginManager([Alone()]))
