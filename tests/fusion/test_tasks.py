"""Steps as data: a whole fusion with every step solved in another process, the queue's rules, and the contract."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Cnn, Mlp
from torch import Tensor, nn

from mergekit_ot import AbstractExecutor, FusionResult, SolverError, StepSolution, TaskQueue, fuse, run_task
from mergekit_ot.testing import check_executor


def solved(pickled: bytes) -> bytes:
    """What another process does: it gets a task as bytes and sends a solution as bytes."""
    torch.set_num_threads(1)
    return pickle.dumps(run_task(pickle.loads(pickled)))


class Elsewhere(AbstractExecutor):
    """Every task is pickled, solved in another process, and the solution pickled back."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool = pool
        self.sent: list[int] = []

    def run(self, queue: TaskQueue) -> None:
        while (task := queue.take()) is not None:
            pickled = pickle.dumps(task)
            self.sent.append(len(pickled))
            queue.give(pickle.loads(self.pool.submit(solved, pickled).result()))


class AtOnce(AbstractExecutor):
    """All steps that are ready run at the same time, and the last to be taken is given back first."""

    def run(self, queue: TaskQueue) -> None:
        with ThreadPoolExecutor(4) as pool:
            while not queue.is_done:
                futures: list[Future[StepSolution]] = []
                while (task := queue.take()) is not None:
                    futures.append(pool.submit(run_task, task))
                wait(futures)
                for future in reversed(futures):
                    queue.give(future.result())


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as workers:
        yield workers


class Recurrent(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, hidden, batch_first=True), nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Heads(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inside = nn.Linear(5, width)
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.inside(x)).mean(1))


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Mlp((6, 8, 5, 3)).eval()


def cnn(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Cnn().eval()


def recurrent(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Recurrent(6 + seed).eval()


def heads(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Heads(8).eval()


CASES = {
    "mlp": (mlp, (6,), {"solver": "wb"}),
    "mlp-matched": (mlp, (6,), {"solver": "weight-matching"}),
    "mlp-averaged": (mlp, (6,), {"solver": "average"}),
    "cnn-by-responses": (cnn, (1, 8, 8), {"solver": "activation-matching"}),
    "cnn-refined": (cnn, (1, 8, 8), {"solver": "wb", "refine": True}),
    "lstm-of-two-widths": (recurrent, (3, 4), {"solver": "gwb"}),
    "heads": (heads, (3, 5), {"solver": "wb"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fusion_whose_steps_run_in_another_process_gives_the_same_bytes(case: str, pool: ProcessPoolExecutor) -> None:
    make, shape, options = CASES[case]
    models = [make(seed) for seed in (0, 1)]
    data = [torch.randn(20, *shape, generator=torch.Generator().manual_seed(0))] * 2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = fuse(models, data=data, device="cpu", **options)
        elsewhere = Elsewhere(pool)
        there = fuse(models, data=data, device="cpu", executor=elsewhere, **options)
    finally:
        torch.set_num_threads(threads)
    assert elsewhere.sent
    assert outcome(there) == outcome(here)


def outcome(result: FusionResult) -> tuple[object, ...]:
    state = {name: value.numpy().tobytes() for name, value in result.state.items()}
    return state, result.groups, result.objectives, result.aligned_sources_max_error


def test_a_task_is_small_next_to_its_model(pool: ProcessPoolExecutor) -> None:
    """A task carries what its step reads, not the network: the weights of other layers stay at home."""

    def deep(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layers = [nn.Linear(64, 64) for _ in range(12)]
        return nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())), nn.Linear(64, 3))

    elsewhere = Elsewhere(pool)
    models = [deep(seed) for seed in (0, 1)]
    fuse(models, example_inputs=torch.zeros(2, 64), executor=elsewhere, device="cpu")
    whole = sum(value.numel() * value.element_size() for model in models for value in model.state_dict().values())
    assert len(elsewhere.sent) == 12
    assert max(elsewhere.sent) < whole / 3


def test_contract_holds_for_what_runs_at_once() -> None:
    check_executor(AtOnce())


class LeavesOver(AbstractExecutor):
    def run(self, queue: TaskQueue) -> None:
        task = queue.take()
        assert task is not None
        queue.give(run_task(task))


class GivesTwice(AbstractExecutor):
    def run(self, queue: TaskQueue) -> None:
        while (task := queue.take()) is not None:
            solution = run_task(task)
            queue.give(solution)
            queue.give(solution)


class GivesWhatNobodyTook(AbstractExecutor):
    def run(self, queue: TaskQueue) -> None:
        queue.give(StepSolution(0, {}, ()))


class FindsNothing(AbstractExecutor):
    def run(self, queue: TaskQueue) -> None:
        while (task := queue.take()) is not None:
            queue.give(StepSolution(task.number, {}, run_task(task).reports))


@pytest.mark.parametrize(
    ("executor", "error", "message"),
    [
        (LeavesOver, SolverError, "steps left over"),
        (GivesTwice, SolverError, "given back without having been taken, or twice"),
        (GivesWhatNobodyTook, SolverError, "given back without having been taken, or twice"),
        (FindsNothing, AssertionError, "same reports"),
    ],
)
def test_contract_names_what_is_broken(executor: type[AbstractExecutor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_executor(executor())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.data())
def test_a_step_is_ready_when_those_before_it_are_done(count: int, data: st.DataObject) -> None:
    pairs = [(first, second) for second in range(count) for first in range(second)]
    edges = data.draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    steps = nx.DiGraph(edges)
    steps.add_nodes_from(range(count))
    done: list[int] = []
    queue = TaskQueue(steps, lambda number: number, lambda solution: done.append(solution.number))
    under_way: list[int] = []
    while not queue.is_done:
        number = queue.take() if data.draw(st.booleans()) or not under_way else None
        if number is not None:
            assert set(steps.predecessors(number)) <= set(done)
            assert number not in done + under_way
            under_way.append(number)
        elif under_way:
            chosen = data.draw(st.sampled_from(under_way))
            under_way.remove(chosen)
            queue.give(StepSolution(chosen, {}, ()))
    assert sorted(done) == list(range(count))
    assert queue.take() is None
