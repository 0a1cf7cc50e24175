"""Metrics, interpolation and barriers, against values computed by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mergekit_ot.errors import ArchitectureError, DataError, RecipeError
from mergekit_ot.pictures.curves import plot_barrier
from mergekit_ot.scoring.devices import choose_device
from mergekit_ot.scoring.evaluation import Evaluation, evaluate, score_states
from mergekit_ot.scoring.path import barrier, interpolate


def _data(count: int = 60, classes: int = 3, width: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, width, generator=generator)
    y = torch.randint(classes, (count,), generator=generator)
    return list(zip(x.split(7), y.split(7), strict=True))


def _net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))


def test_against_one_batch_by_hand() -> None:
    net, data = _net(0).eval(), _data()
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    score = evaluate(net, data)
    assert score.count == 60
    assert score.loss == pytest.approx(nn.functional.cross_entropy(net(x), y).item(), abs=1e-6)
    assert score.accuracy == pytest.approx(100 * (net(x).argmax(1) == y).float().mean().item(), abs=1e-4)


def test_log_softmax_outputs_score_the_same() -> None:
    net = _net(0)
    one, other = evaluate([net, nn.Sequential(net, nn.LogSoftmax(1))], _data())
    assert one.loss == pytest.approx(other.loss, abs=1e-6)
    assert one.accuracy == other.accuracy


def test_several_models_are_scored_in_one_pass() -> None:
    nets, reads = [_net(0), _net(1)], []

    def data():
        for batch in _data():
            reads.append(1)
            yield batch

    together = evaluate(nets, data)
    assert len(reads) == len(_data())
    assert together == tuple(evaluate(net, _data()) for net in nets)
    assert together[0] != together[1]


def test_model_comes_back_as_it_was() -> None:
    net = _net(0).train()
    net[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    evaluate(net, _data())
    assert net.training
    assert net[0].training
    assert not net[1].training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_float_targets_give_squared_error_and_no_accuracy() -> None:
    data = [(torch.zeros(4, 2), torch.full((4, 1), 2.0)), (torch.zeros(2, 2), torch.zeros(2, 1))]
    net = nn.Linear(2, 1, bias=False)
    assert evaluate(net, data) == Evaluation(loss=4 * 4 / 6, accuracy=None, count=6)
    assert evaluate(net, [(x, y[:, 0]) for x, y in data]).loss == pytest.approx(16 / 6)


def test_sequence_models_score_every_position() -> None:
    table = nn.Embedding(5, 5)
    table.weight.data = torch.eye(5) * 50
    tokens = torch.randint(5, (3, 7))
    score = evaluate(table, [(tokens, tokens)])
    assert (score.loss, score.accuracy, score.count) == (pytest.approx(0, abs=1e-9), 100.0, 21)
    classes_second = nn.Sequential(table, nn.Flatten(0, 0))
    classes_second.forward = lambda x: table(x).movedim(-1, 1)  # type: ignore[method-assign]
    assert evaluate(classes_second, [(tokens, tokens)]).accuracy == 100.0


def test_first_output_counts() -> None:
    rnn = nn.RNN(4, 3, batch_first=True)
    assert evaluate(rnn, [(torch.randn(2, 5, 4), torch.randint(3, (2, 5)))]).count == 10


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], DataError, "no batches"),
        ([(torch.zeros(2, 4), torch.tensor([0, 3]))], DataError, "Target 3 is no class of a model with 3 outputs"),
        ([(torch.zeros(2, 4), torch.tensor([0, -1]))], DataError, "Target -1"),
        ([(torch.zeros(2, 4), torch.zeros(5, dtype=torch.long))], DataError, "one row of logits per target"),
        ([(torch.zeros(2, 4), torch.zeros(2, 7))], DataError, "squared error"),
        ([({"x": torch.zeros(2, 4)}, torch.tensor([0, 1]))], DataError, r"has dict where a tensor is needed"),
        ([(torch.zeros(2, 4), [0, 1])], DataError, r"Batch 0 .* has list where a tensor is needed"),
        ([(torch.zeros(2, 9), torch.tensor([0, 1]))], ArchitectureError, r"cannot take inputs of shape \(2, 9\)"),
    ],
)
def test_errors(data: list, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate(_net(0), data)


def test_unknown_device_is_a_clear_error() -> None:
    for name, said in (("gpu7", "Unknown device 'gpu7'"), ("xla", "Unknown device 'xla'")):
        with pytest.raises(RecipeError, match=f"{said}. Use auto, cpu, cuda or mps"):
            choose_device(name)


@pytest.mark.parametrize("name", ["mps", "cuda"])
def test_a_device_that_is_not_there_is_said_with_what_to_take(name: str) -> None:
    if getattr(torch, name).is_available():
        pytest.skip("this machine has one")
    with pytest.raises(RecipeError, match=f"no {name.upper()} device.*--device cpu or --device auto"):
        choose_device(name)


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1), st.integers(0, 5))
def test_interpolation_is_linear_and_exact_at_its_ends(t: float, seed: int) -> None:
    a, b = _net(seed).state_dict(), _net(seed + 1).state_dict()
    a["1.num_batches_tracked"] += 5
    mixed = interpolate(a, b, t)
    for name, value in mixed.items():
        if value.is_floating_point():
            assert torch.allclose(value, (1 - t) * a[name] + t * b[name], atol=1e-6)
    assert mixed["1.num_batches_tracked"] == 5
    assert all(torch.equal(interpolate(a, b, 0.0)[name], a[name]) for name in a)
    assert all(torch.equal(interpolate(a, b, 1.0)[name], b[name]) for name in b if b[name].is_floating_point())


def test_interpolation_needs_equal_shapes() -> None:
    with pytest.raises(ArchitectureError, match=r"'w' is .2,. in the first model and .3,. in the second"):
        interpolate({"w": torch.zeros(2)}, {"w": torch.zeros(3)}, 0.5)
    with pytest.raises(ArchitectureError, match=r"'b' is missing"):
        interpolate({"w": torch.zeros(2)}, {"w": torch.zeros(2), "b": torch.zeros(2)}, 0.5)


def test_barrier_against_models_built_one_by_one() -> None:
    one, other, data = _net(0), _net(1), _data()
    before = {name: value.clone() for name, value in one.state_dict().items()}
    curve = barrier(_net(2), one.state_dict(), other.state_dict(), iter(data), points=5)
    scores = []
    for t in (0.0, 0.25, 0.5, 0.75, 1.0):
        net = _net(3)
        net.load_state_dict(interpolate(one.state_dict(), other.state_dict(), t))
        scores.append(evaluate(net, data))
    assert curve["t"] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert curve["loss"] == pytest.approx([score.loss for score in scores])
    assert curve["accuracy"] == [score.accuracy for score in scores]
    heights = [s.loss - (1 - t) * scores[0].loss - t * scores[-1].loss for t, s in zip(curve["t"], scores, strict=True)]
    assert curve["loss_barrier"] == pytest.approx(max(heights))
    errors = [100 - s.accuracy for s in scores if s.accuracy is not None]
    tops = [e - (1 - t) * errors[0] - t * errors[-1] for t, e in zip(curve["t"], errors, strict=True)]
    assert curve["error_barrier"] == pytest.approx(max(tops))
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())


def test_barrier_of_a_mirrored_net_is_high_and_of_a_copy_is_zero() -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh(), nn.Linear(2, 2, bias=False))
    net[0].weight.data, net[2].weight.data = torch.eye(2) * 3, torch.eye(2) * 5
    mirrored = {name: -value for name, value in net.state_dict().items()}
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    curve = barrier(net, net.state_dict(), mirrored, [(x, torch.tensor([0, 1]))], points=3)
    assert curve["loss"][0] == curve["loss"][2] < 0.01
    assert curve["loss"][1] == pytest.approx(math.log(2))
    assert curve["loss_barrier"] == pytest.approx(math.log(2) - curve["loss"][0])
    assert curve["error_barrier"] == 50.0
    same = barrier(net, net.state_dict(), net.state_dict(), [(x, torch.tensor([0, 1]))], points=3)
    assert same["loss_barrier"] == same["error_barrier"] == 0.0


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_barrier_swaps_recurrent_weights_too(cell: type[nn.Module]) -> None:
    torch.manual_seed(0)
    one, other = cell(3, 4, batch_first=True), cell(3, 4, batch_first=True)
    data = [(torch.randn(6, 5, 3), torch.randint(4, (6, 5)))]
    curve = barrier(cell(3, 4, batch_first=True), one.state_dict(), other.state_dict(), data, points=2)
    assert curve["loss"] == pytest.approx([evaluate(one, data).loss, evaluate(other, data).loss])


def test_barrier_of_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(x))

    tokens = torch.randint(5, (4, 6))
    one, other = Tied(), Tied()
    curve = barrier(Tied(), one.state_dict(), other.state_dict(), [(tokens, tokens)], points=3)
    assert curve["loss"][2] == pytest.approx(evaluate(other, [(tokens, tokens)]).loss)


def test_barrier_of_a_regression_has_no_error() -> None:
    one, other = nn.Linear(2, 1), nn.Linear(2, 1)
    curve = barrier(one, one.state_dict(), other.state_dict(), [(torch.randn(4, 2), torch.randn(4, 1))], points=3)
    assert curve["accuracy"] is None
    assert curve["error_barrier"] is None
    assert curve["loss_barrier"] >= 0


def test_losses_that_are_not_finite_make_no_barrier() -> None:
    net = nn.Linear(2, 2)
    broken = {name: value * float("nan") for name, value in net.state_dict().items()}
    curve = barrier(net, net.state_dict(), broken, [(torch.ones(2, 2), torch.tensor([0, 1]))], points=3)
    assert math.isnan(curve["loss_barrier"])


def test_one_point_is_no_path() -> None:
    net = nn.Linear(4, 3)
    with pytest.raises(DataError, match=r"at least 2"):
        barrier(net, net.state_dict(), net.state_dict(), _data(), points=1)


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_picture_of_a_barrier(tmp_path: Path, kind: str) -> None:
    one, other = _net(0), _net(1)
    curve = barrier(one, one.state_dict(), other.state_dict(), _data(), points=3)
    path = plot_barrier({"naive": curve, "aligned": curve}, tmp_path / f"curve.{kind}", title="two nets")
    assert path.stat().st_size > 3000
    assert list(tmp_path.iterdir()) == [path]
    if kind == "svg":
        assert "barrier" in path.read_text() or "<svg" in path.read_text()
    with pytest.raises(RecipeError, match=r"no picture"):
        plot_barrier({"naive": curve}, tmp_path / "curve.txt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["input", "target"])
def test_an_input_or_target_that_is_not_finite_is_named(value: float, what: str) -> None:
    net = nn.Linear(4, 2)
    data = [(torch.randn(7, 4), torch.randn(7, 2)) for _ in range(3)]
    data[2][what == "target"][3, 1] = value
    said = rf"{what.capitalize()} 17 of the data \(batch 2, place 3, all counted from 0\)"
    with pytest.raises(DataError, match=said):
        evaluate(net, data)
    with pytest.raises(DataError, match=said):
        score_states(net, [net.state_dict()], data, count=1)


def test_a_model_whose_loss_is_not_finite_is_scored() -> None:
    net = nn.Linear(4, 3)
    nn.init.constant_(net.weight, 1e38)
    (inputs,) = (torch.full((5, 4), 10.0),)
    assert math.isnan(evaluate(net, [(inputs, torch.zeros(5, dtype=torch.long))]).loss)
