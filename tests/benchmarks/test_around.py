"""What stands around the engine: a whole fusion over its floor, in Python and on files, in CPU time.

The floor of a fusion reads both files, takes one product per group, one assignment, one gather and the mean, and
writes. A fusion must trace as well. All arms of a row are measured in turn in one process. The table is printed with
``pytest tests/benchmarks/test_around.py --benchmark-enable --benchmark-only -n0 -s``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mergekit_ot import couple, fuse, ground_cost, trace_model
from mergekit_ot.hooks.manager import default_manager
from mergekit_ot.jobs.fusing import run_fuse
from mergekit_ot.recipe import FusionRecipe
from mergekit_ot.storage.files import file_digest

CASES: dict[str, tuple[str, str, dict[str, object], tuple[int, ...]]] = {
    "mlp-512": ("mlp", "mlp?sizes=784-512-512-512-10", {"sizes": "784-512-512-512-10"}, (1, 28, 28)),
    "mlp-1024": ("mlp", "mlp?sizes=784-1024-1024-1024-10", {"sizes": "784-1024-1024-1024-10"}, (1, 28, 28)),
    "mlp-2048": ("mlp", "mlp?sizes=784-2048-2048-2048-10", {"sizes": "784-2048-2048-2048-10"}, (1, 28, 28)),
    "vgg11": ("vgg11", "vgg11?width=64", {"width": 64}, (3, 32, 32)),
}
# A network of about 100 MiB, for the average alone.
LARGE = ("mlp", "mlp?sizes=784-3072-3072-3072-784", {"sizes": "784-3072-3072-3072-784"}, (1, 28, 28))
ROUNDS = 5


def cpu(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def medians(arms: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """The median CPU time of each arm, all of them run in turn after one round that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, function in arms.items():
            spent = cpu(function)
            if number:
                found[name].append(spent)
    return {name: statistics.median(times) for name, times in found.items()}


def floor(paths: list[Path], weights: list[str], output: Path) -> None:
    """Reads, couples the groups of a chain of layers, given in order, moves, averages and writes."""
    first, second = (load_file(path) for path in paths)
    fused: dict[str, Tensor] = {}
    order: Tensor | None = None
    for place, name in enumerate(weights):
        one, other, bias = first[name], second[name], name.replace("weight", "bias")
        if order is not None:
            other = other.unflatten(1, (len(order), -1))[:, order].reshape(one.shape)
        if place + 1 < len(weights):
            rows = [torch.cat([w.flatten(1), b[:, None]], 1) for w, b in ((one, first[bias]), (other, second[bias]))]
            order = couple(ground_cost(*rows)).index
            other, shift = other[order], second[bias][order]
        else:
            shift = second[bias]
        fused[name] = (one * 0.5).add_(other, alpha=0.5)
        fused[bias] = (first[bias] * 0.5).add_(shift, alpha=0.5)
    save_file(fused, output)


def read_mean_write(paths: list[Path], output: Path) -> None:
    first, second = (load_file(path) for path in paths)
    save_file({name: (value * 0.5).add_(second[name], alpha=0.5) for name, value in first.items()}, output)


def written_pair(name: str, arguments: dict[str, object], folder: Path) -> tuple[list[nn.Module], list[Path]]:
    make = default_manager().get("architecture", name)
    models, paths = [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(make(**arguments).eval())
        paths.append(folder / f"{seed}.safetensors")
        save_file(models[-1].state_dict(), paths[-1])
    return models, paths


def job(paths: list[Path], spec: str, shape: tuple[int, ...], output: Path, solver: str) -> Callable[[], object]:
    recipe = FusionRecipe(
        models=[str(path) for path in paths],
        arch=[spec],
        input_shape=shape,
        output=str(output),
        solver=solver,
        device="cpu",
    )
    return lambda: run_fuse(recipe, default_manager(), lambda _: None)


@pytest.mark.parametrize("case", CASES)
def test_a_fusion_over_its_trace_and_floor(benchmark, case: str, tmp_path: Path) -> None:
    name, spec, arguments, shape = CASES[case]
    models, paths = written_pair(name, arguments, tmp_path)
    inputs = torch.randn(2, *shape)
    weights = [key for key in models[0].state_dict() if key.endswith("weight")]
    arms: dict[str, Callable[[], object]] = {
        "floor": lambda: floor(paths, weights, tmp_path / "floor.safetensors"),
        "trace": lambda: trace_model(models[0], inputs),
        "fuse": lambda: fuse(models, example_inputs=inputs, device="cpu"),
        "job": job(paths, spec, shape, tmp_path / "fused.safetensors", "wb"),
    }
    found = benchmark.pedantic(medians, args=(arms,), rounds=1)
    least = found["floor"] + found["trace"]
    benchmark.extra_info.update(fuse=round(found["fuse"] / least, 2), job=round(found["job"] / least, 2))
    print(
        f"\n{case}: floor {found['floor']:.3f} s, trace {found['trace']:.3f} s; over both: fuse "
        f"{found['fuse'] / least:.2f}, job {found['job'] / least:.2f}; job over fuse {found['job'] / found['fuse']:.2f}"
    )
    fused, expected = (load_file(tmp_path / f"{which}.safetensors") for which in ("fused", "floor"))
    assert all(torch.equal(fused[key], value) for key, value in expected.items())
    assert found["fuse"] < 20 * least


def test_an_average_over_read_mean_write(benchmark, tmp_path: Path) -> None:
    name, spec, arguments, shape = LARGE
    _, paths = written_pair(name, arguments, tmp_path)
    arms = {
        "floor": lambda: read_mean_write(paths, tmp_path / "floor.safetensors"),
        "hash": lambda: [file_digest(path) for path in paths],
        "job": job(paths, spec, shape, tmp_path / "fused.safetensors", "average"),
    }
    found = benchmark.pedantic(medians, args=(arms,), rounds=1)
    ratio, hashed = found["job"] / found["floor"], found["job"] / (found["floor"] + found["hash"])
    benchmark.extra_info.update(ratio=round(ratio, 2), hashed=round(hashed, 2))
    size = paths[0].stat().st_size / 2**20
    print(
        f"\naverage of {size:.0f} MiB x 2: floor {found['floor']:.3f} s; job {ratio:.2f}, over the floor with the "
        f"digests of both files, which the result's record holds, {hashed:.2f}"
    )
    fused, expected = (load_file(tmp_path / f"{which}.safetensors") for which in ("fused", "floor"))
    assert all(torch.equal(fused[key], value) for key, value in expected.items())
    assert ratio < 100
