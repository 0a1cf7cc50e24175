"""Refinement with rotations: what it finds by itself, and after a solver that only reorders."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rotating import MODELS, ROWS, TOKENS, Decoder, apart, planted_copy, seeded
from torch import Tensor, nn

from mergekit_ot import FusionResult, InvertibleMap, fuse
from mergekit_ot.fusion.alignment import FamilyCoupling

pytestmark = pytest.mark.slow

LARGE: dict[str, Callable[[], nn.Module]] = {
    "gpt": lambda: Decoder(layers=1),
    "llama": lambda: Decoder("llama", layers=1),
}


def rotates(result: FusionResult) -> bool:
    held = [each for couplings in result.alignment.couplings.values() for each in couplings]
    members = [m for each in held for m in (each.members.values() if isinstance(each, FamilyCoupling) else [each])]
    return any(isinstance(member, InvertibleMap) for member in members)


def keeps_functions(result: FusionResult, models: list[nn.Module], inputs: Tensor) -> bool:
    moved = [result.models.target.instance(result.aligned_state(number)) for number in range(len(models))]
    return all(apart(model, each, inputs) < 1e-6 for model, each in zip(models, moved, strict=True))


@pytest.mark.parametrize("kind", LARGE)
def test_a_planted_copy_is_found_by_itself(kind: str) -> None:
    model = seeded(LARGE[kind], 1)
    copy = planted_copy(model, LARGE[kind], TOKENS)
    result = fuse([model, copy], solver="refinement", example_inputs=TOKENS)
    assert rotates(result)
    assert apart(model, result.model(), TOKENS) < 1e-6


@pytest.mark.parametrize("solver", ["wb", "gwb", "weight-matching"])
@pytest.mark.parametrize("kind", LARGE)
def test_it_rotates_what_others_reordered_and_leaves_no_more_apart(kind: str, solver: str) -> None:
    models = [seeded(LARGE[kind], seed) for seed in (1, 2)]
    result = fuse(models, solver=solver, refine=True, example_inputs=TOKENS)
    assert rotates(result)
    assert keeps_functions(result, models, TOKENS)
    objectives = result.objectives
    assert objectives["after refinement"] <= objectives["before refinement"]
    # Orders leave much more apart than rotations; where these were there already nothing is left to gain.
    factor = 1.0 if solver == "weight-matching" else 0.9
    assert objectives["after refinement"] <= factor * objectives["before refinement"] * (1 + 1e-9)


@pytest.mark.parametrize("options", [{"symmetry": "permutation"}, {"symmetry": "sign"}])
def test_it_rotates_only_what_it_may(options: dict[str, object]) -> None:
    models = [seeded(LARGE["gpt"], seed) for seed in (1, 2)]
    result = fuse(models, solver="refinement", solver_options=options, example_inputs=TOKENS)
    assert not rotates(result)


def test_it_takes_over_what_the_solver_may() -> None:
    models = [seeded(LARGE["gpt"], seed) for seed in (1, 2)]
    options = {"symmetry": "permutation"}
    result = fuse(models, solver="weight-matching", solver_options=options, refine=True, example_inputs=TOKENS)
    assert not rotates(result)


def test_streams_that_activations_told_are_kept() -> None:
    make = lambda: Stream()  # noqa: E731
    models = [seeded(make, seed) for seed in (1, 2)]
    inputs = torch.randn(40, 6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    given = {"example_inputs": ROWS.double(), "data": [(inputs,)], "solver": "weight-matching"}
    plain, refined = (fuse(models, refine=refine, **given) for refine in (False, True))
    (stream,) = [key for key in plain.alignment.rotations if plain.alignment.target.groups[key].size == 12]
    ours, theirs = (result.alignment.couplings[stream][1] for result in (plain, refined))
    assert isinstance(ours, InvertibleMap)
    assert ours.is_same(theirs)


class Stream(nn.Module):
    """A stream of few anchors: a map of five inputs, neurons behind a norm, and three results."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 12), nn.Linear(12, 3)
        self.norms = nn.ModuleList(nn.RMSNorm(12) for _ in range(2))
        self.up, self.down = nn.Linear(12, 9), nn.Linear(9, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(torch.tanh(self.up(self.norms[0](x))))
        return self.head(self.norms[1](x))


def test_three_sources_are_refined() -> None:
    make, inputs = MODELS["llama"][0], TOKENS
    models = [seeded(make, seed) for seed in (1, 2, 3)]
    result = fuse(models, solver="wb", refine=True, example_inputs=inputs)
    assert rotates(result)
    assert keeps_functions(result, models, inputs)
