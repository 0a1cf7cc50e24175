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
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from networks import llama, resnet50
from torch import nn

import mergekit_ot
from mergekit_ot import ModelGraph, trace_model

TraceFunction = Callable[[FrameType, str, Any], Any]
ROOT = Path(mergekit_ot.__file__).parents[1]
OURS = (f"{ROOT / 'mergekit_ot'}{os.sep}", f"{ROOT / 'plugins'}{os.sep}")
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


def test_time_grows_linearly_with_depth(benchmark) -> None:
    """Twice the layers take twice the time: the cost per layer at the largest depth is not that of a square."""
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
    slopes = per_layer(seconds)
    benchmark.extra_info.update(seconds={d: round(s, 2) for d, s in seconds.items()}, per_layer=slopes)
    print(f"\nseconds by depth {benchmark.extra_info['seconds']}, seconds per further layer {slopes}")
    # Work that grows with the square of the depth would cost four times as much per layer.
    assert slopes[-1] < 2 * slopes[0]


def per_layer(costs: Mapping[int, float]) -> list[float]:
    """Returns what a further layer costs between each depth and the next."""
    return [(costs[b] - costs[a]) / (b - a) for a, b in itertools.pairwise(costs)]


class Residual(nn.Module):
    """Blocks of two linear layers on one residual stream: every block joins the group of all the others."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6)) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def lines_run(function: Callable[[], object]) -> int:
    """Returns how many lines of the package and its plugins a call runs; what torch does by itself is not counted."""
    count = 0

    def count_line(frame: FrameType, event: str, _: object) -> TraceFunction:
        nonlocal count
        count += event == "line"
        return count_line

    def enter(frame: FrameType, event: str, _: object) -> TraceFunction | None:
        return count_line if frame.f_code.co_filename.startswith(OURS) else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.slow
def test_work_grows_linearly_with_depth() -> None:
    """A further layer costs the same number of lines at every depth, to 2 %: twice the layers, twice the work."""
    inputs = torch.zeros(2, 6)
    trace_model(Residual(1), inputs)  # the first trace of a process imports rules
    lines = {depth: lines_run(lambda depth=depth: trace_model(Residual(depth), inputs)) for depth in (4, 8, 16)}
    slopes = per_layer(lines)
    assert min(slopes) > 1000
    assert max(slopes) < 1.02 * min(slopes), lines
