"""Threads: small work stays on one, large work gets more, a number that is given overrides it; results are the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from nets import Cnn, Mlp
from signed import SEQUENCES, Recurrent, traced_once
from torch import nn

from mergekit_ot import AbstractBarycenterSolver, BarycenterProblem, Coupling, Permutation, fuse
from mergekit_ot.errors import RecipeError
from mergekit_ot.threads import multiplications_of_run, threads_for

pytestmark = pytest.mark.usefixtures(traced_once.__name__)


@pytest.fixture(autouse=True)
def _four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    assert torch.get_num_threads() == 4
    torch.set_num_threads(before)


class Counting(AbstractBarycenterSolver):
    """Takes neurons as they stand, and notes how many threads there are."""

    name = "counting"

    def find(self, problem: BarycenterProblem) -> tuple[Coupling, ...]:
        """Notes the number of threads."""
        counted[problem.size] = torch.get_num_threads()
        return tuple(Permutation.identity(problem.size) for _ in problem.measures)


counted: dict[int, int] = {}


def _counts(threads: int | None = None) -> dict[int, int]:
    counted.clear()
    net = nn.Sequential(nn.Linear(1000, 1100), nn.ReLU(), nn.Linear(1100, 20), nn.ReLU(), nn.Linear(20, 2))
    fuse([net, net], solver=Counting(), example_inputs=torch.randn(2, 1000), threads=threads)
    return dict(counted)


def test_a_step_gets_as_many_threads_as_it_is_worth() -> None:
    assert _counts() == {1100: 2, 20: 1}


def test_a_number_that_is_given_overrides_it() -> None:
    assert _counts(3) == {1100: 3, 20: 3}
    assert _counts(1) == {1100: 1, 20: 1}


def test_never_more_than_there_are() -> None:
    with threads_for(1e18) as count:
        assert count == torch.get_num_threads() == 4
    with threads_for(0) as count, threads_for(1e18) as inner:
        assert count == inner == 1


def test_threads_are_as_before_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), threads_for(0):
        raise ZeroDivisionError
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("threads", [0, -1, 2.5, 10**6, True])
def test_what_is_no_number_of_threads_is_refused(threads: object) -> None:
    with pytest.raises(RecipeError, match="threads="):
        fuse([nn.Linear(2, 2)] * 2, example_inputs=torch.randn(1, 2), threads=threads)  # type: ignore[arg-type]


def test_each_weight_counts_once_per_place_of_a_sample() -> None:
    assert multiplications_of_run(10, (torch.zeros(5, 7),)) == 50
    assert multiplications_of_run(10, (torch.zeros(5, 3, 4, 4),)) == 800
    assert multiplications_of_run(10, (torch.zeros(5, 7, dtype=torch.long),)) == 350
    assert multiplications_of_run(10, ("no tensor",)) == 10


_NETWORKS = {
    "mlp": (Mlp, torch.randn(3, 6)),
    "cnn": (Cnn, torch.randn(2, 1, 8, 8)),
    "rnn": (lambda: Recurrent(nn.RNN, 6), SEQUENCES),
}


@pytest.mark.parametrize("solver", ["wb", "weight-matching", "gwb", "otfusion"])
@pytest.mark.parametrize("name", _NETWORKS)
def test_results_do_not_depend_on_the_number_of_threads(name: str, solver: str) -> None:
    make, inputs = _NETWORKS[name]
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(make())
    one, several = (fuse(models, solver=solver, example_inputs=inputs, threads=count) for count in (1, 3))
    assert all(torch.equal(one.state[key], several.state[key]) for key in one.state)
    assert [group.cost for group in one.groups] == pytest.approx([group.cost for group in several.groups], rel=1e-12)


@pytest.mark.parametrize("solver", ["wb", "weight-matching", "activation-matching", "average"])
def test_large_layers_do_not_depend_on_the_number_of_threads(solver: str) -> None:
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(nn.Sequential(nn.Linear(300, 400, bias=False), nn.ReLU(), nn.Linear(400, 10)))
    data = [(torch.randn(50, 300),) for _ in range(2)]
    one, several = (fuse(models, solver=solver, data=data, threads=count) for count in (1, 3))
    assert all(torch.equal(one.state[key], several.state[key]) for key in one.state)
