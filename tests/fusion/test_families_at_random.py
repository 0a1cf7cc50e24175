"""Random networks with families (groups of channels, shared key heads, experts, groups in groups): every solver."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_networks.block import IMAGES, LINES, Chain, Description, NetworkDescription, kinds, one_of
from random_networks.network import inputs_of, made
from signed import randomised, traced_once
from torch import nn

from mergekit_ot import AbstractExecutor, FusionResult, StepTask, fuse, run_task
from mergekit_ot.fusion.alignment import Alignment
from mergekit_ot.fusion.executor import TaskQueue
from mergekit_ot.fusion.tensors import alignment_objective
from mergekit_ot.graph.layouts import leaf_groups

pytestmark = pytest.mark.usefixtures(traced_once.__name__)

ATTENTION = ("GroupedQueries", "Heads", "Attention")
EXPERTS = ("StackedExperts", "ListedExperts", "Experts")
CHANNELS = ("GroupsInGroups", "Convolution", "Norm", "Scale", "Residual")
BLOCKS = {LINES: (*ATTENTION, *EXPERTS, *CHANNELS), IMAGES: (*CHANNELS, "Depthwise", "Tokens")}
SOLVERS = (
    "wb",
    "gwb",
    "otfusion",
    "weight-matching",
    "weight-matching",
    "weight-matching",
    "activation-matching",
    "average",
    "refinement",
)


def blocks(axis: int, depth: int) -> st.SearchStrategy[Description]:
    """Blocks with families, and those that contain such blocks."""
    found = []
    for name in BLOCKS[axis]:
        kind = kinds()[name]
        if depth > 0 or not kind.chains:
            inside = [chains(kind.inner or axis, depth - 1) for _ in range(kind.chains)]
            found.append(st.tuples(st.just(name), st.tuples(*kind.draws), st.tuples(*inside)))
    return st.one_of(found)


def chains(axis: int, depth: int) -> st.SearchStrategy[Chain]:
    return st.lists(blocks(axis, depth), min_size=1, max_size=3 if depth else 2).map(tuple)


NETWORKS = st.one_of(
    st.tuples(st.just(LINES), st.just("linear"), chains(LINES, 1), one_of("mean", "flatten")),
    st.tuples(st.just(IMAGES), st.just("linear"), chains(IMAGES, 1), one_of("mean", "flatten")),
)


class Watching(AbstractExecutor):
    """Runs steps one after the other and writes down the objective before each, once every group is coupled.

    Attributes:
        runs: The objectives of each run of a solver.
    """

    def __init__(self) -> None:
        self.runs: list[list[float]] = []
        self.last: tuple[str, Alignment] | None = None

    def run(self, queue: TaskQueue) -> None:
        while (task := queue.take()) is not None:
            self.look(task)
            queue.give(run_task(task))

    def look(self, task: StepTask) -> None:
        target = task.alignment.target
        if task.solver.max_sweeps == 0 or not all(task.alignment.is_aligned(key) for key in target.groups):
            return
        weight = task.solver.structure_weight
        objective = alignment_objective(task.tensors, task.alignment, task.model_weights, weight)
        assert objective is not None
        if self.last is None or self.last[0] != task.solver.name:
            self.runs.append([])
        self.last = (task.solver.name, task.alignment)
        self.runs[-1].append(objective)


def statistics_drawn(model: nn.Module, seed: int) -> nn.Module:
    """The model with buffers as training leaves them: every neuron has its own."""
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
        if name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


def is_matched_to_itself(result: FusionResult) -> bool:
    """Whether a group that is no family stands twice in a tensor: weight matching looks past what is between."""
    target = result.alignment.target
    families = {outer for group in target.groups.values() for outer in group.context}
    for layouts in target.layouts.values():
        held = [key for layout in layouts for key in leaf_groups(layout)]
        if any(held.count(key) > 1 and not target.groups[key].context and key not in families for key in held):
            return True
    return False


def holds(description: NetworkDescription, solver: str, refine: bool, weights: tuple[float, ...] | int) -> None:
    count = weights if isinstance(weights, int) else len(weights)
    inputs = inputs_of(description).double()
    models = [statistics_drawn(randomised(made(description).double(), seed), seed) for seed in range(count)]
    watching = Watching()
    result = fuse(
        models,
        solver=solver,
        refine=refine,
        model_weights=None if isinstance(weights, int) else weights,
        solver_options={"random_starts": 1} if solver == "gwb" else {},
        data=[inputs] if solver == "activation-matching" else None,
        executor=watching,
        example_inputs=inputs,
        device="cpu",
    )
    assert result.aligned_sources_max_error < 1e-8
    assert all(result.alignment.is_function_preserving(number) for number in range(count))
    if refine:
        assert result.objectives["after refinement"] <= result.objectives["before refinement"]
    if solver != "weight-matching" or not is_matched_to_itself(result):
        slack = 1e-6 * sum(float(p.detach().square().sum()) for model in models for p in model.parameters())
        for run in watching.runs:
            assert all(after <= before + slack for before, after in itertools.pairwise(run)), run


def law(examples: int) -> settings:
    return settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )


SOURCES = one_of(2, 3, (0.7, 0.3), (0.6, 0.3, 0.1), (1.0, 0.0), (0.0, 1.0, 0.0))


@law(3)
@given(NETWORKS, one_of(*SOLVERS), st.booleans(), SOURCES)
def test_families_are_fused_and_no_step_raises_the_objective(
    description: NetworkDescription, solver: str, refine: bool, weights: tuple[float, ...] | int
) -> None:
    holds(description, solver, refine, weights)


@pytest.mark.slow
@law(8)
@given(NETWORKS, one_of(*SOLVERS), st.booleans(), SOURCES)
def test_many_families_are_fused_and_no_step_raises_the_objective(
    description: NetworkDescription, solver: str, refine: bool, weights: tuple[float, ...] | int
) -> None:
    holds(description, solver, refine, weights)


NESTED = (
    LINES,
    "linear",
    (("ListedExperts", (2, 6, True), ()), ("GroupsInGroups", ((3, 2), "none", "norm", False), ())),
    "mean",
)
QUERIES = (
    LINES,
    "linear",
    (("GroupedQueries", ((6, 2), "none", False, True), ()), ("StackedExperts", (3, 6, "plain", "own bias"), ())),
    "mean",
)
STREAM = (
    IMAGES,
    "linear",
    (("Residual", (), ((("Norm", ("group", 3), ()), ("Convolution", (3, 3, 12, False), ())),)),),
    "mean",
)


@pytest.mark.parametrize(
    ("description", "count"), [(NESTED, 2), (STREAM, 3), pytest.param(QUERIES, 3, marks=pytest.mark.slow)]
)
def test_weight_matching_and_refinement_of_families(description: NetworkDescription, count: int) -> None:
    holds(description, "weight-matching", True, count)
