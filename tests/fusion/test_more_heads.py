"""A fused network with more heads, or groups of channels, than any source: each is a copy of one of the anchor's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rotating import TOKENS, Decoder, apart, planted_copy, seeded
from torch import Tensor, nn

from mergekit_ot import FusionResult, Plan, fuse
from mergekit_ot.errors import SolverError
from mergekit_ot.graph.blocks import blocks_of, places_of
from mergekit_ot.graph.layouts import IN

SLOW_SOLVERS = ("gwb", "otfusion", "average", "weight-matching", "activation-matching")
SOLVERS = ["wb", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_SOLVERS)]
IMAGES = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Groups(nn.Module):
    """A grouped convolution behind GroupNorm, three channels in each group."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.inside, self.norm = nn.Conv2d(2, 3 * groups, 3), nn.GroupNorm(groups, 3 * groups)
        self.grouped = nn.Conv2d(3 * groups, 2 * groups, 3, groups=groups)
        self.head = nn.Linear(2 * groups, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.grouped(torch.tanh(self.norm(self.inside(x))))).mean((2, 3)))


# Name -> a network by its number of heads, inputs, its own number, and that of the fused one.
CASES: dict[str, tuple[Callable[[int], nn.Module], Tensor, int, int]] = {
    "gpt": (lambda heads: Decoder(layers=1, heads=heads), TOKENS, 2, 4),
    "tied": (lambda heads: Decoder(layers=1, heads=heads, is_tied=True), TOKENS, 2, 4),
    "llama": (lambda heads: Decoder("llama", layers=1, heads=heads), TOKENS, 2, 5),
    "several queries": (lambda heads: Decoder("llama", layers=1, heads=2 * heads, key_heads=heads), TOKENS, 2, 3),
    "groups": (lambda groups: Groups(groups).double(), IMAGES, 2, 5),
}

SOME = ["gpt", "groups", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tied", "llama", "several queries"))]


def fused(name: str, solver: str, *seeds: int, **options: object) -> tuple[list[nn.Module], FusionResult]:
    """Networks of several seeds, and their fusion with more heads; seed 0 stands for a copy of seed 1."""
    make, inputs, few, many = CASES[name]
    first = seeded(lambda: make(few), 1)
    copy = lambda: planted_copy(first, lambda: make(few), inputs)  # noqa: E731
    models = [seeded(lambda: make(few), seed) if seed else copy() for seed in seeds]
    data = [(inputs,)] if solver == "activation-matching" else None
    return models, fuse(models, solver=solver, example_inputs=inputs, data=data, target=make(many).double(), **options)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", SOME)
def test_a_network_alone_is_widened_to_the_same_function(name: str, solver: str) -> None:
    (model,), result = fused(name, solver, 1)
    assert apart(model, result.model(), CASES[name][1]) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_planted_copy_changes_nothing(name: str) -> None:
    (model, _), result = fused(name, "weight-matching", 1, 0)
    # A head is tied again by least squares.
    assert apart(model, result.model(), CASES[name][1]) < (1e-4 if name == "tied" else 1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("place", [0, 1])
def test_all_weight_on_one_source_returns_it(solver: str, place: int) -> None:
    weights = (1.0 - place, float(place))
    models, result = fused("gpt", solver, 1, 2, model_weights=weights)
    assert apart(models[place], result.model(), TOKENS) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_source_computes_what_it_did(name: str) -> None:
    models, result = fused(name, "weight-matching", 1, 2)
    for number, model in enumerate(models):
        moved = result.models.target.instance(result.aligned_state(number))
        assert apart(model, moved, CASES[name][1]) < 1e-6
    assert result.check.is_telling


@pytest.mark.parametrize("name", SOME)
def test_copies_share_what_a_head_sends(name: str) -> None:
    _, _, few, many = CASES[name]
    _, result = fused(name, "wb", 1, 2)
    graph = result.alignment.target
    outer = [key for key, group in graph.free_groups.items() if (group.size, group.context) == (many, ())]
    plans = [coupling for key in outer for coupling in result.alignment.couplings[key]]
    assert plans
    for plan in plans:
        assert isinstance(plan, Plan)
        # One head of the source for each fused one, all of them taken, none more than once oftener than another.
        assert (plan.matrix > 0).sum(1).tolist() == [1] * many
        counts = (plan.matrix > 0).sum(0)
        assert len(counts) == few
        assert int(counts.max()) - int(counts.min()) <= 1
        assert torch.allclose(plan.matrix.sum(1), torch.full((many,), 1 / many, dtype=torch.float64))


def test_what_reads_copies_adds_up_to_what_read_the_head() -> None:
    (model, *_), result = fused("gpt", "wb", 1)
    (before, after) = (state["heads.0.o.weight"] for state in (model.state_dict(), result.state))
    assert torch.allclose(after.unflatten(1, (2, 8)).sum(1), before)
    layout = result.alignment.target.layouts["heads.0.o.weight"]
    block = next(iter(blocks_of(after, layout)))
    key = next(d.group for d in block.dimensions if d.group is not None and d.size == 4)
    place = places_of(block, key)[0]
    assert result.alignment.target.roles["heads.0.o.weight", block.dimensions[place].axis, key] == IN
    assert torch.allclose(block.view.select(place, 0), block.view.select(place, 2))


@pytest.mark.slow
def test_more_heads_are_fused_like_as_many() -> None:
    make, inputs, few, many = CASES["llama"]
    models = [seeded(lambda seed=seed: make(few), seed) for seed in (1, 2)]
    targets = [make(size).double() for size in (few, many)]
    as_many, more = (fuse(models, solver="wb", example_inputs=inputs, target=target) for target in targets)
    assert apart(as_many.model(), more.model(), inputs) < 1e-6


@pytest.mark.slow
def test_sources_of_two_and_three_heads_make_five() -> None:
    models = [seeded(lambda heads=heads: Decoder(layers=1, heads=heads), heads) for heads in (3, 2)]
    result = fuse(models, solver="weight-matching", example_inputs=TOKENS, target=Decoder(layers=1, heads=5).double())
    moved = result.models.target.instance(result.aligned_state(0))
    assert apart(models[0], moved, TOKENS) < 1e-6
    assert result.model()(TOKENS).isfinite().all()


def test_channels_of_groups_are_not_copied() -> None:
    with pytest.raises(SolverError, match="no source has the fused model's sizes"):
        fuse([seeded(lambda: Groups(2), 1)], solver="wb", example_inputs=IMAGES, target=Wider(4).double())


class Wider(Groups):
    """Groups of more channels."""

    def __init__(self, groups: int) -> None:
        super().__init__(groups)
        self.inside, self.norm = nn.Conv2d(2, 5 * groups, 3), nn.GroupNorm(groups, 5 * groups)
        self.grouped = nn.Conv2d(5 * groups, 2 * groups, 3, groups=groups)
