"""What one assignment takes beside the product that makes its cost.

Run with ``pytest tests/benchmarks/test_assignment.py --benchmark-enable --benchmark-only -s``: prints a table in
Markdown. CPU time of one thread, taken in turns, median of five; *before* is the assignment with half of the least cost
taken off each row, whatever the case.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import lap
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mergekit_ot import couple, ground_cost

ROUNDS = 5


def rows(kind: str, size: int, dimension: int) -> tuple[Tensor, Tensor]:
    """Returns the neurons of two layers: unrelated, or one in another order and with noise."""
    generator = torch.Generator().manual_seed(size)
    first, second = (torch.randn(size, dimension, generator=generator) for _ in range(2))
    order = torch.randperm(size, generator=generator)
    return (first, second) if kind == "unrelated" else (first, first[order] + 0.7 * second)


def half_levelled(cost: np.ndarray) -> np.ndarray:
    levelled = cost - 0.5 * cost.min(1, keepdims=True)
    levelled -= 0.5 * levelled.min(0, keepdims=True)
    return lap.lapjvs(levelled, return_cost=False, jvx_like=False, prefer_float32=True)[0]


def taken(arms: dict[str, Callable[[], object]]) -> dict[str, float]:
    spent: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(ROUNDS + 1):
        for name, work in arms.items():
            start = time.process_time()
            work()
            if number:
                spent[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in spent.items()}


def print_table() -> None:
    cells = "neurons", "numbers each", "layers", "product, ms", "ours / product", "before", "SciPy", "cost over SciPy's"
    print(f"\n| {' | '.join(cells)} |")
    print("|---|---|---|---|---|---|---|---|")
    for size in (256, 512, 1024, 2048):
        for kind, dimension in (("unrelated", 4 * size), ("planted", 4 * size), ("unrelated", size)):
            first, second = rows(kind, size, dimension)
            cost = ground_cost(first, second)
            array, places = cost.numpy(), torch.arange(size)
            best = cost.double()[linear_sum_assignment(cost.double().numpy())].sum()
            ours = float(cost.double()[places, couple(cost).partners()].sum() / best)
            arms: dict[str, Callable[[], object]] = {
                "product": lambda first=first, second=second: ground_cost(first, second),
                "ours": lambda cost=cost: couple(cost),
                "before": lambda array=array: half_levelled(array),
                "scipy": lambda array=array: linear_sum_assignment(array),
            }
            spent = taken(arms)
            ratios = " | ".join(f"{spent[name] / spent['product']:.2f}" for name in ("ours", "before", "scipy"))
            milliseconds = f"{1000 * spent['product']:.1f}"
            print(f"| {size} | {dimension} | {kind} | {milliseconds} | {ratios} | {ours:.7f} |", flush=True)


def test_assignment(benchmark) -> None:
    torch.set_num_threads(1)
    benchmark.pedantic(print_table, rounds=1)
    assert benchmark.stats["min"] > 0
