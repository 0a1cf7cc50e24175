"""What a trace does not take: branches on sizes, types, values and counters are seen by the check, or at least told."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergekit_ot import check_model, fuse, trace_model
from mergekit_ot.errors import GraphMismatchError
from mergekit_ot.graph.symmetry import check
from mergekit_ot.graph.symmetry.check import CheckReport

TOLD = "The program was recorded for this case only"


class Branching(nn.Module):
    """Multiplies the hidden neurons by their numbers in some cases, which only their own order stands."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("numbers", torch.arange(1.0, 9.0), persistent=False)
        self.calls, self.limit = 0, 17

    def asks(self, x: Tensor) -> bool:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.second(h * self.numbers if self.asks(x) else h)


class BatchAboveEight(Branching):
    def asks(self, x: Tensor) -> bool:
        return x.shape[0] > 8


class BatchOfOne(Branching):
    def asks(self, x: Tensor) -> bool:
        return x.shape[0] == 1


class BatchAboveAnAttribute(Branching):
    def asks(self, x: Tensor) -> bool:
        return len(x) > self.limit


class BatchOfFives(Branching):
    def asks(self, x: Tensor) -> bool:
        count, _ = x.shape
        return count % 5 == 0


class LargeValues(Branching):
    def asks(self, x: Tensor) -> bool:
        return float(x.abs().max()) > 50


class LargeValuesListed(Branching):
    def asks(self, x: Tensor) -> bool:
        return max(x.flatten().tolist()) > 50


class FourthCall(Branching):
    def asks(self, x: Tensor) -> bool:
        self.calls += 1
        return self.calls > 3


class SecondCall(Branching):
    def asks(self, x: Tensor) -> bool:
        is_later = hasattr(self, "seen")
        self.seen = True
        return is_later


class DoubleOnly(Branching):
    def asks(self, x: Tensor) -> bool:
        return x.dtype == torch.float64


class SingleOnly(Branching):
    def asks(self, x: Tensor) -> bool:
        return x.dtype == torch.float32


class HalfOnly(Branching):
    def asks(self, x: Tensor) -> bool:
        return x.dtype == torch.float16


SEEN = (
    BatchAboveEight,
    BatchOfOne,
    BatchAboveAnAttribute,
    BatchOfFives,
    LargeValues,
    LargeValuesListed,
    FourthCall,
    SecondCall,
    DoubleOnly,
)


@pytest.mark.parametrize("make", SEEN)
def test_a_branch_that_the_trace_did_not_take_is_seen_and_told(make: type[nn.Module]) -> None:
    inputs = torch.randn(4, 4)
    report = check_model(make, inputs, trials=1)
    assert (report.culprits, report.groups, report.preserved) == (("first.weight:0",), 0, None)
    told = [sentence for sentence in report.warnings if sentence.startswith(TOLD)]
    assert any(f"'{make.__name__}' asks `" in sentence and "(test_other_cases.py:" in sentence for sentence in told)


def test_a_branch_that_cannot_be_run_is_told_by_check_and_by_fuse() -> None:
    inputs = torch.randn(4, 4)
    report = check_model(HalfOnly, inputs, trials=1)
    assert (report.groups, report.preserved) == (1, True)
    (told,) = report.warnings
    assert told.startswith(TOLD)
    assert told in fuse([HalfOnly(), HalfOnly()], example_inputs=inputs).warnings


def _followed(make: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(make(), nn.ReLU(), nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


@pytest.mark.parametrize("make", SEEN)
def test_a_fusion_leaves_in_place_what_a_branch_refutes(make: type[nn.Module]) -> None:
    inputs = torch.randn(4, 4)
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(_followed(make))
    result = fuse(models, example_inputs=inputs, solver="weight-matching")
    free = set(check_model(lambda: _followed(make), inputs, trials=1).graph.free_groups)
    assert {report.name for report in result.groups} == free == {"0.second.weight:0", "2.weight:0"}
    assert any(sentence.startswith(TOLD) for sentence in result.warnings)
    # The other side of most of the branches: nine rows, large values.
    aligned = copy.deepcopy(models[1])
    aligned.load_state_dict(result.aligned_state(1))
    others = 100 * torch.randn(9, 4)
    assert torch.allclose(aligned(others), models[1](others), rtol=1e-4)


def test_what_a_branch_refutes_in_one_source_is_resized_in_none() -> None:
    class Wide(BatchAboveEight):
        def __init__(self, hidden: int = 8) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, hidden), nn.Linear(hidden, 3)
            self.register_buffer("numbers", torch.arange(1.0, hidden + 1), persistent=False)

    widths = [_followed(Wide), _followed(lambda: Wide(6))]
    with pytest.raises(GraphMismatchError, match="cannot be resized: the function changed when it was reordered"):
        fuse(widths, example_inputs=torch.randn(4, 4))


def test_too_large_a_network_is_not_run_in_other_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEOT_MAX_CHECK_BYTES", "100")
    result = fuse([_followed(BatchAboveEight) for _ in range(2)], example_inputs=torch.randn(4, 4), dry_run=True)
    assert {key for step in result.plan.steps for key in step.groups} >= {"0.first.weight:0"}
    assert any("not tried: it would take" in sentence for sentence in result.warnings)


def test_a_branch_that_the_trace_took_is_pinned_by_it() -> None:
    graph = trace_model(SingleOnly(), torch.randn(4, 4))
    assert not graph.free_groups
    assert any("constant 'numbers'" in sentence for sentence in graph.pin_sentences())


class Configured(nn.Module):
    """Asks for nothing but its configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm, self.kind = nn.Linear(4, 8), nn.Linear(8, 3), None, "relu"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if x.shape[1] != 4:
            raise ValueError("four features")
        assert x.ndim == 2
        h = self.first(x)
        if self.norm is not None:
            h = self.norm(h)
        if mask is not None and mask.shape[0] > 3:
            h = h * mask
        if self.kind == "relu" and not self.training:
            h = torch.relu(h)
        return self.second(h.view(h.shape[0], -1) * (h > 0.5))


def test_questions_on_the_configuration_are_not_told() -> None:
    report = check_model(Configured, torch.randn(4, 4), trials=1)
    assert (report.groups, report.preserved, report.warnings) == (1, True, ())


def test_a_branch_both_sides_of_which_hold_costs_no_freedom() -> None:
    class Either(Branching):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.second(torch.relu(h) if x.shape[0] > 8 else torch.tanh(h))

    report = check_model(Either, torch.randn(4, 4), trials=1)
    assert (report.groups, report.certified, report.preserved) == (1, 1, True)


def test_a_recording_that_is_another_function_is_told() -> None:
    class Bounded(Branching):
        """Random inputs take another side than the large ones that are traced."""

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.first(x))
            return self.second(h * 2 if torch.linalg.vector_norm(x).item() > 1e4 else h)

    report = check_model(Bounded, 1e5 * torch.ones(4, 4), trials=1)
    assert any("the module computes something else" in sentence for sentence in report.warnings)


class Restless(nn.Module):
    """Counts the calls of all its instances: the same weights give another function each time."""

    total = 0

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        Restless.total += 1
        return self.second(torch.relu(self.first(x))) * Restless.total


def test_a_function_that_does_not_repeat_is_never_called_preserved() -> None:
    report = check_model(Restless, torch.randn(4, 4), trials=1)
    assert report.preserved is False
    assert report.max_error > 1e-3
    assert (report.groups, report.culprits) == (1, ())  # no group is to blame
    assert any("Two runs of fresh instances" in sentence for sentence in report.warnings)


def test_what_changes_the_function_after_all_pins_is_not_preserved(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def report_at(error: float) -> CheckReport:
        judged = check.judge

        def changed(*given, **named):
            verdict = judged(*given, **named)
            return check.Verdict(verdict.symmetry, verdict.places, error, verdict.certified, verdict.culprits)

        monkeypatch.setattr(check, "judge", changed)
        try:
            return check_model(make, torch.randn(2, 4), trials=1)
        finally:
            monkeypatch.setattr(check, "judge", judged)

    assert report_at(1e-12).preserved is True
    assert report_at(1e-3).preserved is False


def plain_tensor(is_converted: bool) -> Callable[[], nn.Module]:
    class Plain(nn.Module):
        """Holds a tensor outside its state since it was made, and a parameter that the trace cannot see."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
            self.gain, self.plain = nn.Parameter(torch.ones(8)), torch.ones(8)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.first(x)) * self.plain
            return self.second(h * torch.from_numpy(self.gain.detach().numpy() * 1.0) if is_converted else h)

    return Plain


@pytest.mark.parametrize("is_converted", [False, True])
def test_an_instance_that_was_never_run_is_not_accused(is_converted: bool) -> None:
    report = check_model(plain_tensor(is_converted), torch.randn(4, 4), trials=1)
    # What goes through NumPy is recorded as a constant, so that nothing may move beside it.
    assert (report.groups, report.preserved) == ((0, None) if is_converted else (1, True))
    (sentence,) = [each for each in report.warnings if "'plain'" in each]
    assert "stale" not in sentence


@pytest.mark.parametrize("content", ["", "(\n" * 9, '"""\n' * 9, "\0", "    if\n" * 9])
def test_code_that_does_not_stand_in_its_file_is_traced(content: str, tmp_path: Path) -> None:
    """As in a notebook, or where the file was changed since."""
    path = tmp_path / "other.py"
    path.write_text(content)
    lines = ("class Net(nn.Linear):", "    def forward(self, x):", "        return torch.relu(super().forward(x))")
    scope: dict[str, Any] = {"nn": nn, "torch": torch, "__name__": "other"}
    exec(compile("\n" * 3 + "\n".join(lines), str(path), "exec"), scope)
    assert trace_model(nn.Sequential(scope["Net"](4, 5), nn.Linear(5, 2)), torch.randn(2, 4)).free_groups
