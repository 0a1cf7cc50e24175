"""The law that what refit finds does not depend on the number of threads, on wide maps too."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from mergeot_repair.refit import pieces
from mergeot_repair.refit.grams import Gram
from mergeot_repair.refit.pieces import each, in_pieces
from mergeot_repair.refit.refit import RefitRepair
from torch import nn

from mergekit_ot import fuse


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_bytes_do_not_depend_on_the_number_of_threads() -> None:
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        nets.append(nn.Sequential(nn.Linear(24, 512), nn.ReLU(), nn.Linear(512, 4)))
    data = torch.randn(400, 24, generator=torch.Generator().manual_seed(2))
    result = fuse(nets, solver="average", example_inputs=data[:100], device="cpu")
    context = result.repair_context(result.state, (0.5, 0.5), [(batch,) for batch in data.split(100)])
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(RefitRepair().repair(context))
        assert torch.get_num_threads() == count
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


def test_pieces_run_beside_each_other_on_one_thread_each() -> None:
    torch.set_num_threads(3)
    barrier = threading.Barrier(3, timeout=30)

    def meet(number: int) -> tuple[int, int]:
        # Nobody comes through before all three are there.
        barrier.wait()
        return number, torch.get_num_threads()

    with in_pieces():
        assert each(meet, range(3), multiplications=1e12) == [(0, 1), (1, 1), (2, 1)]
        assert (
            each(lambda number: threading.current_thread(), [0, 1], multiplications=1)
            == [threading.current_thread()] * 2
        )
    assert torch.get_num_threads() == 3


def test_what_goes_wrong_in_a_piece_is_raised_and_threads_are_given_back() -> None:
    torch.set_num_threads(2)

    def fail(number: int) -> None:
        raise ValueError(number)

    with pytest.raises(ValueError, match="1"), in_pieces():
        each(fail, [1], multiplications=1e12)
    assert torch.get_num_threads() == 2


def test_inner_products_are_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_WORTH_SHARING", 0)
    rows = torch.randn(50, 600, generator=torch.Generator().manual_seed(0))
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        total = Gram(600)
        with in_pieces():
            total.add(rows)
        found.append(total.whole())
    assert torch.equal(*found)
    assert torch.allclose(found[0], (rows.double().T @ rows.double()), rtol=1e-4, atol=1e-3)
