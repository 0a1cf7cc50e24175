"""What tracing costs beside the capture by torch alone, and how it grows with depth.

Run with ``pytest tests/benchmarks/test_tracing.py --benchmark-enable --benchmark-only``. ``ratio`` is the time of
`trace_model` over that of ``torch.export`` with its in-place writes removed, measured side by side in one run;
``peak_mib`` is the largest memory of a process that does nothing but trace this network, torch included.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import llama, resnet50
from torch import nn

from mergekit_ot import ModelGraph, trace_model

DEPTHS = (4, 8, 16, 32)
TOKENS = torch.zeros(2, 16, dtype=torch.long, device="meta")
NETS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "resnet50": (resnet50, torch.zeros(2, 3, 224, 224)),
    **{f"llama-7b-{depth}-layers": ((lambda depth=depth: llama(depth)), TOKENS) for depth in DEPTHS},
}
# The kernel's high-water mark of this process alone: what getrusage tells carries over from the parent.
_PEAK = """
import json, re, sys
sys.path.insert(0, sys.argv[1])
from test_tracing import NETS
from mergekit_ot import trace_model
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
make, inputs = NETS[sys.argv[2]]
model = make()
before = peak()
groups = len(trace_model(model, inputs).free_groups)
print(json.dumps({"groups": groups, "before": before, "peak": peak()}))
"""


def captured_alone(model: nn.Module, inputs: torch.Tensor) -> None:
    torch.export.export(model.eval(), (inputs,), strict=False).run_decompositions({})


@pytest.mark.parametrize("name", NETS)
def test_trace(benchmark, name: str) -> None:
    make, inputs = NETS[name]
    model = make()
    trace_model(model, inputs)  # the first trace of a process imports half of torch
    floors = []
    for _ in range(3):
        start = time.process_time()
        captured_alone(make(), inputs)
        floors.append(time.process_time() - start)
    times = []

    def trace() -> ModelGraph:
        start = time.process_time()
        graph = trace_model(model, inputs)
        times.append(time.process_time() - start)
        return graph

    graph = benchmark.pedantic(trace, rounds=3, iterations=1)
    measured = peak_of(name)
    assert measured["groups"] == len(graph.free_groups)
    benchmark.extra_info.update(
        groups=len(graph.free_groups),
        operations=len(graph.operations),
        floor_s=round(min(floors), 2),
        trace_s=round(min(times), 2),
        ratio=round(min(times) / min(floors), 2),
        peak_mib=measured["peak"] // 1024,
        imports_mib=measured["before"] // 1024,
    )
    print(f"\n{name}: {dict(benchmark.extra_info)}")


def peak_of(name: str) -> dict[str, int]:
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, here, name], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_growth_with_depth_is_linear(benchmark) -> None:
    """Twice the layers take twice the time: the cost per layer at the largest depth over that at half of it."""
    seconds: dict[int, float] = {}
    for depth in DEPTHS:
        make, inputs = NETS[f"llama-7b-{depth}-layers"]
        model = make()
        runs = []
        for _ in range(3):
            start = time.process_time()
            trace_model(model, inputs)
            runs.append(time.process_time() - start)
        seconds[depth] = min(runs)
    benchmark.pedantic(lambda: None, rounds=1)
    slopes = [(seconds[b] - seconds[a]) / (b - a) for a, b in itertools.pairwise(DEPTHS)]
    benchmark.extra_info.update(seconds={d: round(s, 2) for d, s in seconds.items()}, per_layer=slopes)
    print(f"\nseconds by depth {benchmark.extra_info['seconds']}, seconds per further layer {slopes}")
