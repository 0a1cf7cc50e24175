"""Our search for a fused Gromov-Wasserstein coupling beside POT's, on asymmetric structure.

Run with ``pytest tests/benchmarks/test_gromov_against_pot.py --benchmark-enable --benchmark-only -s``: prints a table
in Markdown. All see the same problem (alpha = 1: the squared difference of supports plus that of structures), and each
coupling is made a permutation by one assignment before it is compared. ``objective`` is POT's over ours, mean and
range over the draws; ``plan`` the same for POT's plan as it comes, where that is a coupling (its marginals are right
to one per cent); processor times are of one thread, taken in turns.
Trained networks are taken from the cache of the experiments (``MERGEOT_CACHE``) where there are any.
"""

import itertools
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ot
import torch
from mergeot_gromov.solver import GromovBarycenterSolver
from planted import planted_permutation
from scipy.optimize import linear_sum_assignment

from mergekit_ot import BarycenterProblem, NeuronMeasure, ground_cost, load_checkpoint

DRAWS = 10
EPSILON = 0.1
OURS = GromovBarycenterSolver(alpha=1.0, epsilon=EPSILON)
Plan = np.ndarray


@dataclass(frozen=True)
class Pair:
    """Two networks' neurons as POT takes them: the ground cost and one density matrix each; the planted order."""

    problem: BarycenterProblem
    order: np.ndarray | None = None

    @property
    def cost(self) -> np.ndarray:
        first, second = (measure.support.double() for measure in self.problem.measures)
        return ground_cost(first, second).numpy()

    @property
    def densities(self) -> list[np.ndarray]:
        return [measure.structure[0].double().numpy() * measure.size**0.5 for measure in self.problem.measures]

    @property
    def is_fused(self) -> bool:
        return self.problem.measures[0].support.shape[1] > 0

    def objective(self, plan: Plan) -> float:
        first, second = self.densities
        size = len(first)
        squares = (np.square(first).sum() + np.square(second).sum()) / size**2
        return float((self.cost * plan).sum() + squares - 2 * (first @ plan @ second.T * plan).sum())


def by_us(pair: Pair) -> Plan:
    return OURS.solve(pair.problem).couplings[1].transport_plan().double().numpy()


def by_conditional_gradient(pair: Pair, symmetric: bool = False) -> Plan:
    first, second = pair.densities
    if pair.is_fused:
        plan = ot.gromov.fused_gromov_wasserstein(pair.cost, first, second, symmetric=symmetric, alpha=0.5)
    else:
        plan = ot.gromov.gromov_wasserstein(first, second, symmetric=symmetric)
    return np.asarray(plan)


def by_symmetric(pair: Pair) -> Plan:
    return by_conditional_gradient(pair, symmetric=True)


def by_bapg(pair: Pair) -> Plan:
    """POT's BAPG with the problem scaled to entries of about one, as ours scales epsilon."""
    first, second = pair.densities
    scale = pair.cost.mean() / 2 + (np.square(first).mean() + np.square(second).mean()) / 2
    first, second = first / scale**0.5, second / scale**0.5
    if pair.is_fused:
        # Half of alpha and half of one minus alpha: half of our objective.
        plan = ot.gromov.BAPG_fused_gromov_wasserstein(
            pair.cost / scale, first, second, symmetric=False, alpha=0.5, epsilon=EPSILON / 2
        )
    else:
        plan = ot.gromov.BAPG_gromov_wasserstein(first, second, symmetric=False, epsilon=EPSILON)
    return np.asarray(plan)


METHODS: Mapping[str, Callable[[Pair], Plan]] = {
    "POT, conditional gradient": by_conditional_gradient,
    "the same, symmetric=True": by_symmetric,
    "POT, BAPG": by_bapg,
}


def permutation_near(plan: Plan) -> tuple[np.ndarray, Plan]:
    order = linear_sum_assignment(-plan)[1]
    return order, np.eye(len(plan))[order] / len(plan)


def planted_pairs(size: int, noise: float, dimension: int) -> Iterable[Pair]:
    for seed in range(DRAWS):
        problem, planted = planted_permutation(size, noise, dimension, seed)
        yield Pair(problem, planted.index.numpy())


def unrelated_pairs(size: int, dimension: int) -> Iterable[Pair]:
    for seed in range(DRAWS):
        both = (planted_permutation(size, 0.0, dimension, seed=each)[0] for each in (seed, DRAWS + seed))
        yield Pair(BarycenterProblem(tuple(problem.measures[0] for problem in both), (0.5, 0.5), size))


def trained_pairs(has_inputs: bool) -> Iterable[Pair]:
    """All pairs of the trained networks of one recurrent layer with one gate."""
    folder = Path(os.environ.get("MERGEOT_CACHE") or Path.home() / ".cache" / "mergeot") / "trained"
    measures = []
    for path in sorted(folder.glob("rows-*.safetensors")):
        checkpoint = load_checkpoint(path)
        if checkpoint.arguments.get("cell") == "rnn" and checkpoint.arguments.get("hidden") == 128:
            state = {name.removeprefix("recurrent."): tensor for name, tensor in checkpoint.state.items()}
            inputs = [state["weight_ih_l0"], *(state[f"bias_{end}_l0"][:, None] for end in ("ih", "hh"))]
            support = torch.cat(inputs, 1) if has_inputs else torch.zeros(128, 0)
            measures.append(NeuronMeasure.uniform(support, state["weight_hh_l0"][None]))
    for pair in itertools.combinations(measures[:6], 2):
        yield Pair(BarycenterProblem(pair, (0.5, 0.5), 128))


PROBLEMS: Mapping[str, Callable[[], Iterable[Pair]]] = {
    "planted, 28 inputs, 64 neurons, noise 2": lambda: planted_pairs(64, 2.0, 28),
    "planted, 28 inputs, 128 neurons, noise 2.5": lambda: planted_pairs(128, 2.5, 28),
    "planted, no inputs, 128 neurons, noise 0.6": lambda: planted_pairs(128, 0.6, 0),
    "planted, no inputs, 128 neurons, noise 1.25": lambda: planted_pairs(128, 1.25, 0),
    "unrelated, 28 inputs, 128 neurons": lambda: unrelated_pairs(128, 28),
    "unrelated, no inputs, 128 neurons": lambda: unrelated_pairs(128, 0),
    "trained RNNs, with input weights": lambda: trained_pairs(has_inputs=True),
    "trained RNNs, recurrent weights alone": lambda: trained_pairs(has_inputs=False),
}


@dataclass
class Record:
    """What one method did on the draws of one problem."""

    seconds: float = 0.0
    hits: int = 0
    objectives: tuple[float, ...] = ()
    plans: tuple[float, ...] = ()
    marginals: float = 0.0

    def add(self, pair: Pair, method: Callable[[Pair], Plan]) -> None:
        started = time.process_time()
        plan = method(pair)
        self.seconds += time.process_time() - started
        order, rounded = permutation_near(plan)
        self.hits += pair.order is not None and bool((order == pair.order).all())
        self.objectives += (pair.objective(rounded),)
        self.plans += (pair.objective(plan),)
        errors = (np.abs(plan.sum(axis) * len(plan) - 1).max() for axis in (0, 1))
        self.marginals = max(self.marginals, *errors)


def ratio(theirs: tuple[float, ...], ours: tuple[float, ...]) -> str:
    values = np.array(theirs) / np.array(ours)
    return f"{values.mean():.3f} ({values.min():.3f} to {values.max():.3f})"


def print_table() -> None:
    warnings.simplefilter("ignore")
    print("\n| problem | search | recovered | objective | plan | ms | time over ours |\n|" + "---|" * 7)
    for name, draw in PROBLEMS.items():
        records = {method: Record() for method in ("ours", *METHODS)}
        pairs = list(draw())
        if not pairs:
            print(f"| {name} | none in the cache |")
            continue
        for pair in pairs:
            for method, record in records.items():
                record.add(pair, by_us if method == "ours" else METHODS[method])
        ours = records["ours"]
        for method, record in records.items():
            hits = f"{record.hits}/{len(pairs)}" if pairs[0].order is not None else "–"
            is_coupling = record.marginals < 0.01
            plan = ratio(record.plans, ours.objectives) if is_coupling else f"marginals off by {record.marginals:.0%}"
            cells = ["1", "1"] if record is ours else [ratio(record.objectives, ours.objectives), plan]
            milliseconds = 1000 * record.seconds / len(pairs)
            row = [name, method, hits, *cells, f"{milliseconds:.0f}", f"{record.seconds / ours.seconds:.1f}"]
            print(f"| {' | '.join(row)} |", flush=True)


def test_against_pot(benchmark) -> None:
    torch.set_num_threads(1)
    by_us(next(iter(unrelated_pairs(16, 2))))
    benchmark.pedantic(print_table, rounds=1)
    assert benchmark.stats["min"] > 0
