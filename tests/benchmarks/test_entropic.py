"""What entropic couplings cost above the exact one, and how long they take.

Run with ``pytest tests/benchmarks/test_entropic.py --benchmark-enable --benchmark-only -s``: a table in Markdown.
``epsilon`` is ours, relative to the mean of the ground cost; ``of max`` is the same relative to its largest entry, as
the authors of arXiv:2210.06671 count it. Means over 10 draws (of the cost also the largest),
processor time of one thread. Then what a barycenter of two sources takes with `epsilon=0.01` and with exact couplings,
in turn, median of five: unrelated Gaussian neurons, those of perceptrons trained on the digits of scikit-learn (the
second hidden layer, the first aligned), and neurons with a noisy copy of themselves.
"""

import itertools
import time
from functools import partial

import ot
import torch
from contests import medians
from mergeot_wasserstein.entropic import sinkhorn
from mergeot_wasserstein.solver import WassersteinBarycenterSolver
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mergekit_ot import BarycenterProblem, NeuronMeasure, couple, ground_cost, uniform_mass

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


def trained(width: int, seed: int) -> list[Tensor]:
    """Returns what the neurons of two hidden layers of a perceptron of digits are seen by, layer by layer."""
    data = load_digits()
    images, digits = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    optimiser = torch.optim.Adam(model.parameters())
    for batch in itertools.chain.from_iterable(torch.randperm(len(images)).split(64) for _ in range(20)):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), digits[batch]).backward()
        optimiser.step()
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    return [torch.cat([layer.weight, layer.bias[:, None]], 1).detach() for layer in layers[:2]]


def neurons(kind: str, size: int) -> tuple[Tensor, Tensor]:
    """Returns the neurons of two sources."""
    generator = torch.Generator().manual_seed(size)
    first, second = (torch.randn(size, 300, generator=generator) for _ in range(2))
    if kind == "noisy":
        return first, first[torch.randperm(size, generator=generator)] + 0.5 * second
    if kind == "trained":
        one, other = trained(size, 0), trained(size, 1)
        order = couple(ground_cost(one[0], other[0])).partners()
        return one[1], torch.cat([other[1][:, order], other[1][:, -1:]], 1)
    return first, second


def print_ratios() -> None:
    print("\n| neurons | exact, ms | entropic, ms | ratio |\n|" + "---|" * 4)
    for kind, size in itertools.product(("unrelated", "trained", "noisy"), (64, 128, 256, 512)):
        measures = tuple(NeuronMeasure.uniform(rows) for rows in neurons(kind, size))
        problem = BarycenterProblem(measures, (0.5, 0.5), size)
        solvers = [WassersteinBarycenterSolver(), WassersteinBarycenterSolver(epsilon=0.01)]
        taken = medians({str(solver.epsilon): partial(solver.solve, problem) for solver in solvers})
        exact, entropic = (1000 * each for each in taken.values())
        print(f"| {size} {kind} | {exact:.1f} | {entropic:.1f} | {entropic / exact:.1f} |")


def test_entropic(benchmark) -> None:
    torch.set_num_threads(1)
    benchmark.pedantic(print_table, rounds=1)
    print_ratios()
    assert benchmark.stats["min"] > 0
