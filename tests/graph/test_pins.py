"""Pins: what cannot be proven movable stays, says why, and never breaks the function."""

from collections.abc import Callable, Mapping

import mergeot_layers
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from unruled import twist

from mergekit_ot import (
    ArchitectureError,
    EinRule,
    FunctionRule,
    NodeRule,
    OperationView,
    check_model,
    hookimpl,
    trace_model,
)
from mergekit_ot.hooks.manager import PluginManager


def manager_with(**rules: NodeRule) -> PluginManager:
    class Extra:
        @hookimpl
        def mergeot_node_rules(self) -> dict[str, NodeRule]:
            return {name.replace("__", "."): rule for name, rule in rules.items()}

    return PluginManager([mergeot_layers, Extra()])


class Between(nn.Module):
    """A function between two linear layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(3, 6), nn.Linear(6, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


def test_an_operation_without_a_rule_pins_its_axes_and_says_where_and_what_to_do() -> None:
    graph = trace_model(Between(twist), torch.randn(2, 3))
    assert not graph.free_groups
    (sentence,) = graph.diagnostics.unknown_operations
    assert "mergeot_tests.twist.default" in sentence
    assert "mergeot docs unknown-operations" in sentence
    assert "twist" in str(graph.groups["first.weight:0"].pin)


def test_the_module_path_of_an_unknown_operation_is_named() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return twist(x)

    model = nn.Sequential(nn.Linear(3, 6), nn.Sequential(nn.ReLU(), Inner()), nn.Linear(6, 2))
    (sentence,) = trace_model(model, torch.randn(2, 3)).diagnostics.unknown_operations
    assert "'1.1'" in sentence


def test_pinned_operations_leave_the_other_groups_free() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.relu(self.b(twist(self.a(x)))))

    report = check_model(Partly, torch.randn(2, 3))
    assert (report.groups, report.certified, report.preserved) == (1, 1, True)


def test_a_rule_that_forgets_an_axis_cannot_break_the_function() -> None:
    def forgetful(operation: OperationView) -> list[list]:
        return [[operation.algebra.replicated(size) for size in shape] for shape in operation.output_shapes]

    report = check_model(
        lambda: Between(twist),
        torch.randn(2, 3),
        manager=manager_with(mergeot_tests__twist=FunctionRule(forgetful)),
    )
    assert report.preserved is None
    assert any("does not account" in sentence for sentence in report.warnings)


def test_a_rule_that_lies_is_found_by_the_proof_and_its_group_pinned() -> None:
    def liar(operation: OperationView) -> list[list]:
        return [operation.labels("x")]

    manager = manager_with(mergeot_tests__twist=FunctionRule(liar))
    naive = trace_model(Between(twist), torch.randn(2, 3), manager)
    assert naive.free_groups
    report = check_model(lambda: Between(twist), torch.randn(2, 3), manager=manager)
    assert report.culprits == ("first.weight:0",)
    assert (report.groups, report.preserved) == (0, None)


def test_only_the_lying_group_is_pinned_among_many() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for number, layer in enumerate(self.layers):
                x = twist(layer(x)) if number == 1 else F.relu(layer(x))
            return x

    rule = FunctionRule(lambda operation: [operation.labels("x")])
    report = check_model(Many, torch.randn(2, 5), manager=manager_with(mergeot_tests__twist=rule))
    assert report.culprits == ("layers.1.weight:0",)
    assert (report.groups, report.certified, report.preserved) == (2, 2, True)


def test_a_rule_that_raises_costs_freedom_not_correctness() -> None:
    def broken(operation: OperationView) -> list[list]:
        raise ZeroDivisionError("boom")

    report = check_model(
        lambda: Between(twist),
        torch.randn(2, 3),
        manager=manager_with(mergeot_tests__twist=FunctionRule(broken)),
    )
    assert report.preserved is None
    assert any("boom" in sentence for sentence in report.warnings)


def test_a_cache_left_by_an_earlier_forward_is_refused() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)
            self.bias = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            if not self.training and not hasattr(self, "cache"):
                self.cache = self.bias * 2
            return self.second(self.first(x) + (self.bias * 2 if self.training else self.cache))

    stale = Caching().eval()
    with torch.no_grad():
        stale(torch.randn(2, 3))
    with pytest.raises(ArchitectureError, match="'cache' holds a tensor that an earlier forward left"):
        trace_model(stale, torch.randn(2, 3))
    # torch before 2.11 refuses to capture a forward that leaves attributes behind, which is as safe.
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        with pytest.raises(ArchitectureError, match="cache"):
            check_model(Caching, torch.randn(2, 3))
        return
    report = check_model(Caching, torch.randn(2, 3))
    assert (report.groups, report.certified, report.preserved) == (1, 1, True)


def test_the_unobserved_tail_of_a_table_is_pinned() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
            self.table = nn.Parameter(torch.randn(16, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x) + self.table[: x.shape[1]])

    graph = trace_model(Positions(), torch.randn(2, 5, 3))
    assert any("'table'" in sentence for sentence in graph.diagnostics.unobserved)
    # The rows beyond the traced length follow the others, so the function also stays at a longer input.
    report = check_model(Positions, torch.randn(2, 5, 3))
    assert (report.groups, report.culprits, report.preserved) == (1, (), True)


def test_parameters_that_are_never_used_are_pinned() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.head, self.spare = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(7, 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.used(x)))

    report = check_model(Spare, torch.randn(2, 3))
    assert (report.groups, report.certified) == (1, 1)
    assert any("'spare.weight'" in sentence for sentence in report.warnings)


def test_every_returned_tensor_is_pinned_with_the_reason() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = F.relu(self.first(x))
            return self.second(hidden), hidden

    graph = trace_model(Leaky(), torch.randn(2, 3))
    assert not graph.free_groups
    assert "model output" in str(graph.groups["first.weight:0"].pin)


def test_incompatible_block_structures_are_pinned_not_broken() -> None:
    """Three groups of a norm and four of a convolution on twelve channels have no common refinement."""

    def make() -> nn.Module:
        body = nn.Conv2d(2, 12, 3), nn.GroupNorm(3, 12), nn.Conv2d(12, 8, 3, groups=4)
        return nn.Sequential(*body, nn.Flatten(), nn.Linear(8 * 9, 2))

    report = check_model(make, torch.randn(2, 2, 7, 7))
    assert (report.preserved, report.culprits) == (True, ())
    assert any("no common refinement" in why for why in report.pins)


@pytest.mark.parametrize("source", [0, 1])
def test_tied_parameters_share_one_description(source: int) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
            self.second.weight = self.first.weight
            self.head = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.second(F.relu(self.first(x)))))

    graph = trace_model(Tied(), torch.randn(2, 5))
    assert graph.aliases == {"second.weight": "first.weight"}
    report = check_model(Tied, torch.randn(2, 5), seed=source)
    assert report.preserved in (True, None)
    assert report.culprits == ()


def test_a_forward_that_makes_single_precision_tensors_is_checked_in_single_precision() -> None:
    class Single(Between):
        def forward(self, x: Tensor) -> Tensor:
            hidden = F.relu(self.first(x))
            return self.second(hidden + torch.zeros(hidden.shape[0], 1) @ torch.ones(1, 6, dtype=torch.float32))

    report = check_model(lambda: Single(F.relu), torch.randn(2, 3))
    assert (report.groups, report.certified, report.preserved, report.culprits) == (1, 1, True, ())
    assert report.max_error is not None
    assert report.max_error < 1e-5


def normed() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 2))


@pytest.mark.parametrize("is_touched", [False, True])
@pytest.mark.parametrize("forgotten", ["running_mean", "running_var"])
def test_statistics_that_a_rule_forgets_are_found_though_fresh_ones_are_blind_to_order(
    forgotten: str, is_touched: bool
) -> None:
    arguments = ("input", "weight", "bias", {"running_mean": "running_var", "running_var": "running_mean"}[forgotten])
    line = EinRule("b c *; c; c; c -> b c *", arguments, state=arguments[3:])
    name = "aten._native_batch_norm_legit_no_training"

    def label(operation: OperationView) -> list[list]:
        """Where it lies, it says that it saw the statistics too, and ties them to nothing."""
        labels = line.label(operation)
        for axis in operation.labels(forgotten) if is_touched else []:
            operation.algebra.touch(axis)
        return labels

    class Instead:
        @hookimpl
        def mergeot_symmetries(self) -> Mapping[str, str]:
            return mergeot_layers.mergeot_symmetries()

        @hookimpl
        def mergeot_node_rules(self) -> dict[str, NodeRule]:
            rule = FunctionRule(label, state=arguments[3:])
            return {**mergeot_layers.mergeot_node_rules(), name: rule}  # type: ignore[dict-item]

    inputs = torch.randn(2, 1, 4, 4)
    report = check_model(normed, inputs, manager=PluginManager([Instead()]))
    assert report.groups == 0
    # What a rule does not account for is pinned by the trace, so that a fusion knows it too; a lie is refuted.
    assert report.culprits == (("0.weight:0",) if is_touched else ())
    assert any("does not account" in sentence for sentence in report.warnings) is not is_touched
    assert check_model(normed, inputs).culprits == ()


def test_parameters_that_start_as_ones_are_randomised_before_they_prove_anything() -> None:
    class Scaled(nn.Module):
        """The scale is all ones when fresh, so that a wrong order of it would not be seen."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.atan2(self.first(x), self.scale))

    def untied(operation: OperationView) -> list[list]:
        """Mentions the scale's axis, and does not tie it to the neurons that it scales."""
        for label in operation.labels("other"):
            operation.algebra.touch(label)
        return [operation.labels("self")]

    report = check_model(Scaled, torch.randn(2, 3), manager=manager_with(aten__atan2=FunctionRule(untied)))
    assert set(report.culprits) == {"first.weight:0", "scale:0"}
    assert check_model(Scaled, torch.randn(2, 3)).culprits == ()


def test_what_holds_at_the_traced_length_only_is_found_at_another() -> None:
    class Branching(nn.Module):
        """Longer inputs go another way, which the trace has not seen."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.first(x))
            return self.second(hidden.cumsum(2) if x.shape[1] > 5 else hidden)

    inputs = torch.randn(2, 5, 3)
    assert trace_model(Branching(), inputs).free_groups
    report = check_model(Branching, inputs)
    assert report.culprits == ("first.weight:0",)
    assert report.groups == 0
