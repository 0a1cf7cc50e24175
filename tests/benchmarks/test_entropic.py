"""What entropic couplings cost above the exact one, and how long they take.

Run with ``pytest tests/benchmarks/test_entropic.py --benchmark-enable --benchmark-only -s``: a table in Markdown.
``epsilon`` is ours, relative to the mean of the ground cost; ``of max`` is the same relative to its largest entry, as
the authors of arXiv:2210.06671 count it. Means over 10 draws (of the cost also the largest),
processor time of one thread.
"""

import time

import ot
import torch
from mergeot_wasserstein.entropic import sinkhorn

from mergekit_ot import ground_cost, uniform_mass

DRAWS = range(10)
# Neurons of both sides, and columns.
SIZES = {
    "256 neurons, 256 unrelated": (256, 256, 64),
    "256 neurons, 384 unrelated": (256, 384, 64),
    "9 neurons, 14 unrelated": (9, 14, 6),
}
EPSILONS = (0.1, 0.03, 0.01, 0.003, 0.001)


def unrelated_cost(first_size: int, second_size: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(size, columns, generator=generator) for size in (first_size, second_size))
    return ground_cost(first, second)


def print_table() -> None:
    print("\n| neurons | epsilon | of max | above the exact cost | largest weight of a row | ms | exact, ms |")
    print("|" + "---|" * 7)
    for name, (*sizes, columns) in SIZES.items():
        for epsilon in EPSILONS:
            above, largest, share, taken, exact_taken = [], [], [], 0.0, 0.0
            for seed in DRAWS:
                cost = unrelated_cost(*sizes, columns, seed)
                masses = [uniform_mass(size, cost) for size in sizes]
                started = time.process_time()
                plan = sinkhorn(cost, *masses, epsilon)
                between = time.process_time()
                exact = float(ot.emd2(*(ot.unif(size) for size in sizes), cost.double().numpy(), numItermax=10_000_000))
                exact_taken += time.process_time() - between
                taken += between - started
                above.append(float((plan * cost).sum()) / exact - 1)
                largest.append(float((plan.max(1).values * sizes[0]).mean()))
                share.append(epsilon * float(cost.mean() / cost.max()))
            means = [sum(each) / len(each) for each in (share, above, largest)]
            times = [1000 * each / len(DRAWS) for each in (taken, exact_taken)]
            print(
                f"| {name} | {epsilon:g} | {means[0]:.2g} | {means[1]:.2%}, {max(above):.2%} | {means[2]:.2f} "
                f"| {times[0]:.0f} | {times[1]:.0f} |"
            )


def test_entropic(benchmark) -> None:
    torch.set_num_threads(1)
    benchmark.pedantic(print_table, rounds=1)
    assert benchmark.stats["min"] > 0
