"""The guard at the end of a fusion: what computes something else, aligns nothing or is odd is refused, by name."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nets import Mlp
from shards import ShardWriter
from torch import Tensor, nn

from mergekit_ot import (
    AbstractBarycenterSolver,
    AbstractRepair,
    EinRule,
    FusionInputs,
    FusionOptions,
    Permutation,
    PluginManager,
    ResultError,
    Solution,
    SolverError,
    SourceModel,
    Status,
    fuse,
    hookimpl,
    trace_model,
)
from mergekit_ot.fusion.engine import run_fusion
from mergekit_ot.fusion.function_check import FunctionCheck
from mergekit_ot.fusion.running import Runner, difference
from mergekit_ot.hooks.preparing import prepare

torch.manual_seed(0)
INPUTS = torch.randn(3, 6)
NAN = float("nan")


def manager_with(**tables: Mapping[str, Any]) -> PluginManager:
    """The installed plugins, and one that registers what is given, by hook."""
    manager = PluginManager.load()
    hooks = {f"mergeot_{name}": hookimpl(lambda table=table: table) for name, table in tables.items()}
    manager.register(SimpleNamespace(**hooks), "planted")
    return manager


def nets(make: Callable[[], nn.Module] = Mlp) -> list[nn.Module]:
    torch.manual_seed(0)
    return [make(), make()]


def check_of(models: list[Any], **options: Any) -> FunctionCheck:
    result = fuse(models, **{"example_inputs": INPUTS, **options})
    assert result.check is not None
    assert result.check.error == result.aligned_sources_max_error
    return result.check


class Between(nn.Module):
    """Two linear layers and something between them."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Linear(6, 8), between, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.between(self.first(x))))


class Summed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(x, 1)


class Gains(nn.Module):
    """A gain per channel in a buffer, which says nothing of its order while it is fresh."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


# What it claims is wrong: every entry of a running sum depends on the order.
LYING = {"module:Summed": EinRule("b n -> b n", ("input0",))}


def test_what_a_wrong_rule_lets_go_is_refused_where_it_stands() -> None:
    models = nets(lambda: Between(Summed()))
    with pytest.raises(ResultError) as raised:
        fuse(models, example_inputs=INPUTS, manager=manager_with(node_rules=LYING))
    message = str(raised.value)
    assert "'source 1'" in message
    assert "part first at module 'between' (aten.cumsum" in message
    assert "mergeot check" in message
    assert "Nothing was written" in message


def test_what_is_refused_leaves_a_writer_unfinished(tmp_path: Path) -> None:
    inputs = FusionInputs(nets(lambda: Between(Summed())), example_inputs=INPUTS)
    setup = prepare(inputs, FusionOptions(), manager_with(node_rules=LYING), trace_model)
    with pytest.raises(ResultError):
        run_fusion(setup, writer=ShardWriter(tmp_path / "fused"))
    assert not (tmp_path / "fused" / "index.json").exists()


def test_buffers_that_the_trace_did_not_see_never_lead_to_another_function() -> None:
    make = lambda: Between(Gains())  # noqa: E731
    states = [net.state_dict() for net in nets(make)]
    for state in states:
        state["between.gain"] = torch.rand(8) + 0.5
    sources = [SourceModel(f"{number}.pt", make, state) for number, state in enumerate(states)]
    try:
        result = fuse(sources, example_inputs=INPUTS)
    except ResultError as error:
        assert "'between'" in str(error) or "Nothing can be aligned" in str(error)  # noqa: PT017
    else:
        assert result.check is not None
        assert result.check.error < 1e-5


def test_a_branch_that_was_not_traced_is_told_by_its_module() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = torch.arange(1.0, 9.0)

        def forward(self, x: Tensor) -> Tensor:
            return x if torch.compiler.is_compiling() else x * self.gain

    with pytest.raises(ResultError, match="part first at module 'between', though not as it was traced"):
        fuse(nets(lambda: Between(Late())), example_inputs=INPUTS)


class Linear(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 3))


@pytest.mark.parametrize(("make", "why"), [(Linear, "inputs, outputs or positions"), (Summed, "no neuron group")])
def test_nothing_aligned_is_refused(make: Callable[[], nn.Module], why: str) -> None:
    between = make is Summed
    with pytest.raises(ResultError, match=rf"Nothing can be aligned in 'source 0'.*{why}.*--solver average"):
        fuse(nets((lambda: Between(Summed())) if between else make), example_inputs=INPUTS)


def test_an_average_was_asked_for_and_one_source_needs_no_partner() -> None:
    assert check_of(nets(Linear), solver="average").sentence == (
        "The neurons were taken as they stand: nothing was aligned."
    )
    first = nets(Linear)[0]
    result = fuse([first], example_inputs=INPUTS)
    assert torch.equal(result.state["0.weight"], first.state_dict()["0.weight"])


class Single(AbstractBarycenterSolver):
    """Ends as it is told to."""

    name = "single"
    couplings: Callable[[int], Permutation] = staticmethod(Permutation.identity)
    status = Status.CONVERGED

    def find(self, problem: Any) -> Solution:
        return Solution(tuple(self.couplings(problem.size) for _ in problem.measures), self.status)


def test_costs_that_are_not_finite_are_an_error() -> None:
    class Overflowing(Single):
        status = Status.NONFINITE

    with pytest.raises(SolverError, match=r"'single' cannot compare the neurons of group 'layers\.0\.weight:0'"):
        fuse(nets(), example_inputs=INPUTS, solver=Overflowing())


def test_a_permutation_that_repeats_a_neuron_is_the_solvers_fault() -> None:
    class Repeating(Single):
        couplings = staticmethod(lambda size: Permutation(torch.zeros(size, dtype=torch.long)))

    with pytest.raises(SolverError, match=r"'single' returned a coupling of group .* takes a neuron twice"):
        fuse(nets(), example_inputs=INPUTS, solver=Repeating())


def _without(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name != "layers.1.bias"}


SPOILED = {
    "nan": (
        lambda state: {**state, "layers.1.bias": state["layers.1.bias"] * NAN},
        "5 of 5 entries of 'layers.1.bias'",
    ),
    "missing": (_without, "'layers.1.bias' is missing"),
    "empty": (lambda state: {}, "is missing"),
    "more": (lambda state: {**state, "more": torch.ones(1)}, "'more' is not part of"),
    "shape": (
        lambda state: {**state, "layers.1.bias": torch.ones(4)},
        r"has shape \(4,\), the architecture has \(5,\)",
    ),
    "type": (lambda state: {**state, "layers.1.bias": torch.ones(5).long()}, "is int64 where the sources have float32"),
    "none": (lambda state: {**state, "layers.1.bias": None}, "is a NoneType and no tensor"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_what_a_repair_spoils_is_refused_by_its_name(kind: str, tmp_path: Path) -> None:
    spoil, match = SPOILED[kind]

    class Spoiling(AbstractRepair):
        needs_data = False

        def repair(self, context: Any) -> Any:
            return spoil(dict(context.fused))

    manager = manager_with(repairs={"spoiling": Spoiling})
    setup = prepare(FusionInputs(nets(), example_inputs=INPUTS), FusionOptions(repair="spoiling"), manager, trace_model)
    with pytest.raises(ResultError, match=rf"(?s)repair 'spoiling' made .*{match}.*Nothing was written"):
        run_fusion(setup, writer=ShardWriter(tmp_path / "fused"))
    assert list((tmp_path / "fused").iterdir()) == []


def test_what_is_not_finite_in_a_source_may_stay_so() -> None:
    from mergekit_ot.fusion.written import ResultCheck, template_of

    class Masked(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, -float("inf")]))

    source = SourceModel("bare", Masked)
    check = ResultCheck(template_of(source, [source]), (source,), "solver 'wb'")
    check.state(Masked().state_dict())
    with pytest.raises(ResultError, match=r"'layers\.0\.bias'"):
        check.state({**Masked().state_dict(), "layers.0.bias": torch.full((8,), NAN)})


def test_the_sentence_says_what_was_shown() -> None:
    assert check_of(nets()).sentence.startswith("The aligned sources compute what the sources compute (largest ")
    same = nets()[0]
    assert "already in one order" in check_of([same, same]).sentence


class Headless(Mlp):
    """Fresh, its head is zero, so that nothing shows."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.layers[-1].weight)


def test_behind_zeros_the_proof_is_made_with_others() -> None:
    check = check_of(nets(Headless))
    assert check.is_telling
    assert check.filled == ("layers.2.weight",)
    assert "zeros were filled at random, such as 'layers.2.weight'" in check.sentence


def test_behind_zeros_a_wrong_rule_is_found_all_the_same() -> None:
    class Hidden(Between):
        def __init__(self) -> None:
            super().__init__(Summed())
            nn.init.zeros_(self.last.weight)

    with pytest.raises(ResultError, match=r"with zeros, such as 'last\.weight', filled at random.*'between'"):
        fuse(nets(Hidden), example_inputs=INPUTS, manager=manager_with(node_rules=LYING))


def test_what_does_not_reach_the_output_proves_nothing() -> None:
    models = nets()
    for model in models:
        nn.init.constant_(model.layers[1].bias, -100.0)
    check = check_of(models)
    assert not check.is_telling
    assert "proves nothing" in check.sentence


class Noisy(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x) + random.random())


def test_random_numbers_of_a_forward_are_the_same_in_both_runs_and_the_callers_stay() -> None:
    random.seed(1)
    before = torch.random.get_rng_state(), random.getstate()
    runner = Runner(SourceModel.of(Noisy(), "noisy"), (INPUTS,))
    state = Noisy().state_dict()
    assert difference(runner.outputs(state), runner.outputs(state)) == 0
    assert difference(runner.outputs(state), runner.outputs(state, seed=1)) > 0.01
    assert random.getstate() == before[1]
    assert check_of(nets(Noisy)).error < 1e-5


def test_a_module_that_keeps_something_is_built_anew() -> None:
    class Caching(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "kept"):
                self.kept = self.layers[0].weight.detach().clone()
            return super().forward(x) + self.kept.sum()

    runner = Runner(SourceModel("caching", Caching), (INPUTS,))
    states = [net.state_dict() for net in nets(Caching)]
    fresh = [Runner(SourceModel("caching", Caching), (INPUTS,)).outputs(state) for state in states]
    assert [difference(runner.outputs(state), found) for state, found in zip(states, fresh, strict=True)] == [0, 0]


def deep(depth: int, scale: float) -> nn.Module:
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise([6, *[32] * depth, 3])]
    for layer in layers:
        layer.weight.data *= scale
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())][:-1])


def test_rounding_that_grows_with_depth_is_no_other_function() -> None:
    check = check_of(nets(lambda: deep(22, 10.0)))
    assert check.error > 1e-3
    assert "which is rounding" in check.sentence


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_pass(dtype: torch.dtype) -> None:
    check = check_of(nets(lambda: deep(3, 1.0).to(dtype)), example_inputs=INPUTS.to(dtype))
    assert check.is_telling
    assert check.error < 0.1


def test_noise_does_not_excuse_another_function_in_narrow_types() -> None:
    models = [net.to(torch.bfloat16) for net in nets(lambda: Between(Summed()))]
    with pytest.raises(ResultError, match="part first at module 'between'"):
        fuse(models, example_inputs=INPUTS.to(torch.bfloat16), manager=manager_with(node_rules=LYING))


def test_sources_that_compute_nan_are_told() -> None:
    class Root(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sqrt()

    result = fuse(nets(Root), example_inputs=INPUTS)
    assert any("itself computes NaN or infinity" in text for text in result.warnings)


def test_nan_that_only_an_aligned_source_computes_is_another_function() -> None:
    good, bad = torch.tensor([1.0, 2.0]), torch.tensor([1.0, NAN])
    infinite = torch.tensor([1.0, -float("inf")])
    assert difference([good], [bad]) == float("inf")
    assert difference([bad], [bad.clone()]) == difference([infinite], [infinite.clone()]) == 0
    assert difference([infinite], [-infinite]) == float("inf")
    assert difference([good], []) == difference([good], [good[:1]]) == float("inf")


class Picked(nn.Module):
    """The middle layer's neurons are pinned by the place of the largest, the others are free."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 10), nn.Linear(10, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cumsum(self.middle(torch.relu(self.first(x))), 1))


def test_how_much_was_aligned_is_said() -> None:
    extent = fuse(nets(Picked), example_inputs=INPUTS).extent
    assert (extent.aligned, extent.groups) == (1, 2)
    # The last layer holds no free group: 12 of 6 · 10 + 10 + 10 · 4 + 4 + 4 · 3 + 3 weights, and the middle bias.
    assert extent.pinned_percent == pytest.approx(100 * (12 + 4) / 129)
    assert "aten.cumsum" in extent.because
    assert extent.sentence.startswith("1 of 2 neuron groups aligned, 12 % of the weights pinned, because ")
    whole = fuse(nets(), example_inputs=INPUTS).extent
    assert whole.sentence == "2 of 2 neuron groups aligned, no weight pinned."
    assert fuse(nets(), example_inputs=INPUTS, solver="average").extent.aligned == 0


def test_no_module_is_built_anew_for_the_template_or_the_comparison() -> None:
    built = []

    class Counted(Mlp):
        def __init__(self) -> None:
            super().__init__()
            built.append(1)

    states = [net.state_dict() for net in nets(Mlp)]
    inputs = FusionInputs([SourceModel("s", Counted, state) for state in states], example_inputs=INPUTS)
    setup = prepare(inputs, FusionOptions(), PluginManager.load(), trace_model)
    built.clear()
    assert run_fusion(setup).check is not None
    # The one that was traced is run.
    assert not built


class CountingRuns(Mlp):
    """Counts how often it is run outside a trace."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            type(self).runs += 1
        return super().forward(x)


def test_only_sources_that_moved_are_run() -> None:
    first, second = nets(CountingRuns)
    CountingRuns.runs = 0
    assert check_of([first, first]).error == 0
    assert CountingRuns.runs == 0
    assert check_of([first, second]).has_moved
    # One of two sources moved: itself, its aligned copy, and one that is moved wrongly.
    assert CountingRuns.runs == 3


def test_above_the_budget_nothing_is_run_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEOT_MAX_CHECK_BYTES", "100")
    first, second = nets(CountingRuns)
    CountingRuns.runs = 0
    result = fuse([first, second], example_inputs=INPUTS)
    assert CountingRuns.runs == 0
    assert result.aligned_sources_max_error is None
    assert result.check is not None
    assert "was not checked: the networks take 476 bytes to run, and the limit is 100 bytes" in result.check.sentence
    # Where nothing moved, nothing would be run.
    assert fuse([first, first], example_inputs=INPUTS).aligned_sources_max_error == 0
