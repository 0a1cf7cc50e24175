"""How the time of a fusion grows with the number of sources.

Run with ``pytest tests/benchmarks/test_sources.py --benchmark-enable --benchmark-only -s``: CPU time of one thread, two
and four sources in turn, median of five.
"""

from __future__ import annotations

import pytest
import torch
from contests import medians
from networks import mnist_mlp

from mergekit_ot import FusionInputs, FusionOptions, trace_model
from mergekit_ot.fusion.engine import FusionRun
from mergekit_ot.hooks.manager import default_manager
from mergekit_ot.hooks.preparing import prepare

COUNTS = (2, 4)


def fusion(count: int, solver: str) -> FusionRun:
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        models.append(mnist_mlp().eval())
    inputs = FusionInputs(models, example_inputs=torch.randn(2, 1, 28, 28))
    options = FusionOptions(solver=solver, device="cpu", threads=1)
    return FusionRun(prepare(inputs, options, default_manager(), trace_model))


@pytest.mark.parametrize("solver", ["wb", "weight-matching"])
def test_growth(benchmark, solver: str) -> None:
    torch.set_num_threads(1)
    setups = {str(count): fusion(count, solver).setup for count in COUNTS}
    taken = medians({count: lambda setup=setup: FusionRun(setup).run() for count, setup in setups.items()})
    benchmark.pedantic(lambda: None)
    for count, seconds in taken.items():
        print(f"{solver}, {count} sources: {seconds:.3f} s, {seconds / taken['2']:.1f} times two sources")
    assert min(taken.values()) > 0
