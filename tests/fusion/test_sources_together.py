"""What holds for all sources and all groups together: who gives the order, when sweeps end, what a check says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mergekit_ot import (
    AbstractBarycenterSolver,
    BarycenterProblem,
    Permutation,
    PluginManager,
    Scope,
    Solution,
    Start,
    fuse,
    hookimpl,
    trace_model,
)
from mergekit_ot.fusion.plan import build_plan

INPUTS = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def _mlp(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).eval()


class Grouped(nn.Module):
    """Neurons that hold families of others: a convolution in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.grouped, self.head = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 3, groups=2), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.grouped(F.relu(self.inside(x))))).mean((2, 3))


@pytest.mark.parametrize(("solver", "is_grouped"), [("wb", True), ("wb", False)])
def test_a_source_that_has_all_the_weight_is_the_result_as_it_stands(solver: str, is_grouped: bool) -> None:
    torch.manual_seed(0)
    nets = [Grouped(), Grouped()] if is_grouped else [_mlp(0), _mlp(1)]
    inputs = torch.randn(2, 2, 4, 4) if is_grouped else INPUTS
    result = fuse(nets, solver=solver, model_weights=[0.0, 1.0], example_inputs=inputs, device="cpu")
    for name, value in nets[1].state_dict().items():
        torch.testing.assert_close(result.state[name], value, rtol=0, atol=0)


@dataclass(frozen=True)
class Turning(AbstractBarycenterSolver):
    """Finds something else for the first group in each of its first sweeps, and nothing new for the second."""

    name = "turning"
    start = Start.IDENTITY
    scope = Scope.INCIDENT
    max_sweeps: int = 9

    def find(self, problem: BarycenterProblem) -> Solution:
        in_force = problem.initial
        assert in_force is not None
        turns = int(in_force[1].partners()[0])
        if problem.group != "0.weight:0" or turns == 3:
            return Solution(in_force)
        found = (in_force[0], Permutation(torch.arange(problem.size).roll(-turns - 1)))
        return Solution(found, objective=lambda couplings: float(couplings is in_force))


def test_sweeps_go_on_as_long_as_any_group_changes() -> None:
    manager = PluginManager.load()
    told: list[str] = []

    def progress(done: int, total: int, what: str) -> None:
        told.append(what)

    manager.register(SimpleNamespace(mergeot_solvers=hookimpl(lambda: {"turning": Turning})), "mine")
    nets: Sequence[nn.Module] = [_mlp(0), _mlp(1)]
    fuse(nets, solver="turning", example_inputs=INPUTS, manager=manager, progress=progress, device="cpu")
    # Three sweeps that change the first group, and one that changes nothing.
    assert [what for what in told if "0.weight:0" in what] == [f"sweep {number}: 0.weight:0" for number in (1, 2, 3, 4)]


def test_one_source_of_which_nothing_can_be_told_leaves_the_check_untold() -> None:
    nets = [_mlp(seed) for seed in range(3)]
    nn.init.constant_(nets[2][2].bias, -100.0)
    check = fuse(nets, example_inputs=INPUTS, device="cpu").check
    assert check is not None
    assert not check.is_telling
    assert "proves nothing" in check.sentence


class WithVector(nn.Module):
    """A vector whose order an operation without a rule fixes, beside layers that are free."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)
        self.vector = nn.Parameter(torch.randn(7))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x))) + torch.cumsum(self.vector, 0).sum()


def test_a_pinned_vector_is_no_layer_of_neurons_that_was_lost() -> None:
    torch.manual_seed(0)
    extent = fuse([WithVector(), WithVector()], example_inputs=INPUTS, device="cpu").extent
    assert (extent.aligned, extent.groups) == (1, 1)
    assert extent.pinned_percent == pytest.approx(100 * 7 / (6 * 5 + 5 + 5 * 3 + 3 + 7))


@pytest.mark.parametrize("start", [Start.IDENTITY])
def test_a_family_of_two_groups_waits_for_both(start: Start) -> None:
    graph = trace_model(nn.Sequential(_mlp(0), nn.ReLU(), nn.Linear(3, 2)), INPUTS)
    first, second, family = graph.free_groups
    indexed = replace(graph.groups[family], context=(first, second))
    graph = replace(graph, groups={**graph.groups, family: indexed})
    plan = build_plan(graph, frozenset(graph.free_groups), 1, start)
    solved = [key for step in plan.steps for key in step.groups]
    assert solved.index(family) > max(solved.index(first), solved.index(second))


def test_families_are_solved_with_their_group_before_anything_that_reads_them_is() -> None:
    class Read(Grouped):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.Conv2d(6, 5, 1), nn.ReLU(), nn.Conv2d(5, 3, 1))  # type: ignore[assignment]

    graph = trace_model(Read(), torch.randn(2, 2, 4, 4))
    plan = build_plan(graph, frozenset(graph.free_groups), 1, Start.NOTHING)
    families = {key for key, group in graph.free_groups.items() if group.context}
    assert len(families) == 2
    assert families < set(plan.steps[0].groups)
