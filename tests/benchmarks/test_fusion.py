"""How far a fusion is from its floor: the ground-cost products and the assignments alone.

Run with ``pytest tests/benchmarks --benchmark-enable --benchmark-only``. The group of a pair holds the floor and every
solver, measured in one run; each solver's row carries ``ratio``, its time over the floor's.
"""

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mergekit_ot import FusionInputs, FusionOptions, couple, ground_cost, trace_model
from mergekit_ot.fusion.engine import FusionRun
from mergekit_ot.fusion.setup import FusionSetup
from mergekit_ot.hooks.manager import default_manager
from mergekit_ot.hooks.preparing import prepare

PAIRS: dict[str, tuple[str, dict[str, object], tuple[int, ...]]] = {
    "mnist-mlp": ("mlp", {"sizes": "784-400-200-100-10", "bias": False}, (2, 1, 28, 28)),
    "vgg11": ("vgg11", {"width": 64}, (2, 3, 32, 32)),
}
SOLVERS = ("wb", "otfusion", "weight-matching", "activation-matching", "gwb")


def pair(name: str) -> tuple[list[nn.Module], Tensor]:
    architecture, arguments, shape = PAIRS[name]
    make = default_manager().get("architecture", architecture)
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(make(**arguments).eval())
    return models, torch.randn(shape)


def setup_of(name: str, solver: str) -> FusionSetup:
    models, inputs = pair(name)
    batches = [(torch.randn(100, *inputs.shape[1:]),) for _ in range(2)]
    options = FusionOptions(solver=solver, calibration_size=200, device="cpu")
    return prepare(FusionInputs(models, example_inputs=inputs, data=batches), options, default_manager(), trace_model)


def layers(model: nn.Module) -> list[Tensor]:
    weights = [w.detach().reshape(w.shape[0], -1) for name, w in model.named_parameters() if name.endswith("weight")]
    return weights[:-1]


def floor(models: list[nn.Module]) -> None:
    """One product and one assignment per hidden layer."""
    for one, other in zip(layers(models[0]), layers(models[1]), strict=True):
        couple(ground_cost(one, other))


def best_of(function: Callable[[], object], rounds: int = 3) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize("name", PAIRS)
def test_floor(benchmark, name: str) -> None:
    benchmark.group = name
    models, _ = pair(name)
    benchmark.pedantic(floor, args=(models,), rounds=3, warmup_rounds=1)
    assert benchmark.stats["min"] > 0


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", PAIRS)
def test_fusion(benchmark, name: str, solver: str) -> None:
    benchmark.group = name
    setup = setup_of(name, solver)
    models, _ = pair(name)
    best = best_of(lambda: floor(models))
    rounds, warmup = (1, 0) if (name, solver) == ("vgg11", "gwb") else (3, 1)
    run = benchmark.pedantic(lambda: FusionRun(setup).run(), rounds=rounds, warmup_rounds=warmup)
    assert run is None
    benchmark.extra_info["ratio"] = round(benchmark.stats["min"] / best, 2)
