"""How a proof lies: planted cases that a naive check passes, and ours refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import mergeot_layers
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mergekit_ot import ArchitectureError, FunctionRule, NodeRule, OperationView, check_model, hookimpl, trace_model
from mergekit_ot.graph.build import GraphBuilder
from mergekit_ot.graph.capture.capture import capture
from mergekit_ot.graph.capture.front_end import TraceBudget, TraceLimits
from mergekit_ot.graph.capture.module_state import tied_names
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.propagate import Propagator
from mergekit_ot.graph.symmetry.permutation import random_orders, reorder_state
from mergekit_ot.graph.trace import operation_graph, rule_finder
from mergekit_ot.hooks.manager import PluginManager, default_manager


def graph_without_questions(model: nn.Module, inputs: Tensor, manager: PluginManager | None = None) -> ModelGraph:
    """Traces a module as it is, run before or not."""
    program = capture(model, inputs)
    budget = TraceBudget(TraceLimits(), "test")
    rules = {name: entry.load for name, entry in (manager or default_manager()).node_rules.items()}
    found = Propagator(program, rule_finder(rules), tied_names(model), budget).run()
    return GraphBuilder(found, {}, ()).build(operation_graph(program), program)


def naive_error(model: nn.Module, graph: ModelGraph, inputs: Tensor) -> float:
    """The usual check: one instance with the weights it has, reordered in place and run again."""
    with torch.no_grad():
        before = model(inputs)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        orders = random_orders(graph, torch.Generator().manual_seed(0))
        model.load_state_dict(reorder_state(state, graph, orders))
        after = model(inputs)
        model.load_state_dict(state)
    return float((after - before).abs().max() / before.abs().max())


class Cached(nn.Module):
    """Keeps a product of its gains from the first forward, as some attention biases are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "cache"):
            self.cache = (self.gain * 2).detach()
        return self.second(self.first(x) * self.cache)


def test_a_cache_filled_by_an_earlier_forward() -> None:
    inputs = torch.randn(2, 3)
    stale = Cached().eval()
    stale(inputs)
    graph = graph_without_questions(stale, inputs)
    # The trace holds the stale product as a constant, and the gains look unused: naively all is well.
    assert list(graph.free_groups) == ["first.weight:0"]
    assert "gain" not in {slot.parameter for slot in graph.free_groups["first.weight:0"].members}
    assert naive_error(stale, graph, inputs) < 1e-6
    # On trained gains, in a fresh instance, that order breaks the function.
    trained = Cached().state_dict() | {"gain": torch.arange(1.0, 7.0)}
    moved = reorder_state(trained, graph, random_orders(graph, torch.Generator().manual_seed(0)))
    outputs = []
    for state in (trained, moved):
        fresh = Cached().eval()
        fresh.load_state_dict(state)
        outputs.append(fresh(inputs))
    assert not torch.allclose(*outputs, atol=1e-2)
    with pytest.raises(ArchitectureError, match="'cache' holds a tensor that an earlier forward left"):
        check_model(lambda: copy.deepcopy(stale), inputs)
    report = check_model(Cached, inputs)
    assert (report.groups, report.certified, report.preserved) == (1, 1, True)
    (group,) = report.graph.free_groups.values()
    assert "gain" in {slot.parameter for slot in group.members}


def test_what_a_forward_leaves_on_its_module_is_reported() -> None:
    report = check_model(Cached, torch.randn(2, 3))
    assert any("A forward leaves a tensor in 'cache'" in sentence for sentence in report.warnings)


class Positions(nn.Module):
    """A table of sixteen rows, of which as many are added as the input is long."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.table = nn.Parameter(torch.randn(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x) + self.table[: x.shape[1]]))


def test_a_table_traced_at_length_five_and_used_at_twelve() -> None:
    model, short, long = Positions().eval(), torch.randn(2, 5, 3), torch.randn(2, 12, 3)
    graph = trace_model(model, short)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    moved = reorder_state(state, graph, random_orders(graph, torch.Generator().manual_seed(0)))
    # What a trace at length five has seen of the table are five rows; who moves those alone passes at that length.
    naive = moved | {"table": torch.cat([moved["table"][:5], state["table"][5:]])}
    outcomes = {}
    for name, inputs in (("short", short), ("long", long)):
        model.load_state_dict(state)
        before = model(inputs)
        for who, chosen in (("naive", naive), ("ours", moved)):
            model.load_state_dict(chosen)
            outcomes[who, name] = torch.allclose(model(inputs), before, atol=1e-5)
    assert outcomes == {
        ("naive", "short"): True,
        ("naive", "long"): False,
        ("ours", "short"): True,
        ("ours", "long"): True,
    }
    assert any("'table'" in sentence for sentence in graph.diagnostics.unobserved)
    assert check_model(Positions, short).preserved is True


class LongWay(nn.Module):
    """Inputs of twelve steps or more go another way, which a trace at five has not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.second(hidden.cumsum(2) if x.shape[1] >= 12 else hidden)


def test_a_function_that_changes_at_length_twelve() -> None:
    inputs = torch.randn(2, 5, 3)
    model = LongWay().eval()
    assert naive_error(model, trace_model(model, inputs), inputs) < 1e-6
    report = check_model(LongWay, inputs)
    assert (report.culprits, report.groups) == (("first.weight:0",), 0)


def manager_with(name: str, rule: NodeRule) -> PluginManager:
    class Instead:
        @hookimpl
        def mergeot_symmetries(self) -> Mapping[str, str]:
            return mergeot_layers.mergeot_symmetries()

        @hookimpl
        def mergeot_node_rules(self) -> dict[str, NodeRule]:
            return {**mergeot_layers.mergeot_node_rules(), name: rule}  # type: ignore[dict-item]

    return PluginManager([Instead()])


def _forgets_the_scale(operation: OperationView) -> list[list]:
    """Says that it saw the scale's and the shift's axis, and ties neither to the neurons."""
    for name in ("weight", "bias"):
        for label in operation.labels(name):
            operation.algebra.touch(label)
    return [operation.labels("input")]


def test_a_rule_that_forgets_an_axis() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2))

    inputs, manager = torch.randn(4, 3), manager_with("aten.layer_norm", FunctionRule(_forgets_the_scale))
    fresh = make().eval()
    graph = trace_model(fresh, inputs, manager)
    assert "0.weight:0" in graph.free_groups
    assert "1.weight" not in {slot.parameter for slot in graph.free_groups["0.weight:0"].members}
    # The scale of a fresh norm is all ones and its shift zero, so that no order of them is wrong yet.
    assert naive_error(fresh, graph, inputs) < 1e-6
    report = check_model(make, inputs, manager=manager)
    assert "0.weight:0" in report.culprits
    assert (check_model(make, inputs).groups, check_model(make, inputs).culprits) == (1, ())


def test_the_culprit_is_found_among_groups_that_hold() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            for number, layer in enumerate(self.layers):
                x = torch.cummax(layer(x), 1).values if number == 2 else F.gelu(layer(x))
            return x

    lie = FunctionRule(lambda operation: [operation.labels("self") for _ in operation.output_shapes])
    report = check_model(Mixed, torch.randn(2, 5), manager=manager_with("aten.cummax", lie))
    assert report.culprits == ("layers.2.weight:0",)
    assert (report.groups, report.certified, report.preserved) == (3, 3, True)


class Rescaled(nn.Module):
    """Halves one of its own weights at every forward, as some models do once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.second.weight.div_(2)
        return self.second(torch.tanh(self.first(x)))


def test_a_weight_that_the_forward_rescales_is_no_output() -> None:
    report = check_model(Rescaled, torch.randn(2, 3))
    assert (report.groups, report.certified, report.preserved) == (1, 1, True)


class Remembers(nn.Module):
    """A buffer keeps hidden values for the next forward, which reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)
        self.register_buffer("before", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x)) + self.before
        self.before.copy_(hidden.mean(0))
        return self.second(hidden)


def test_what_the_next_forward_reads_stays_in_place() -> None:
    report = check_model(Remembers, torch.randn(2, 3))
    assert (report.groups, report.preserved) == (0, None)


class Single(nn.Module):
    """Normalises in single precision whatever it is given, and adds to a stream in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 2)
        self.inner = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.inner:
            low = x.float()
            x = x + layer((low * torch.rsqrt(low.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype))
        return self.head(x)


def test_rounding_of_a_layer_in_single_precision_is_no_change_of_the_function() -> None:
    report = check_model(Single, torch.randn(4, 3))
    assert (report.culprits, report.groups, report.certified) == ((), 1, 1)
    assert 1e-10 < report.max_error < 1e-5


@pytest.mark.parametrize("make", [Rescaled, Cached, Positions])
def test_the_instance_that_is_given_is_never_run_or_changed(make: Callable[[], nn.Module]) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    names = set(vars(model))
    trace_model(model, torch.randn(2, 5, 3) if make is Positions else torch.randn(2, 3))
    assert set(vars(model)) == names
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
