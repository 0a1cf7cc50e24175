"""Planes and repaired paths: the geometry, the values at the models, and the pictures."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mergekit_ot.scoring.evaluation as evaluation
from mergekit_ot import barrier, evaluate, fuse, plane, plot_plane
from mergekit_ot.errors import ArchitectureError, DataError, RecipeError
from mergekit_ot.pictures.plane import colour_limits, contour_levels
from mergekit_ot.scoring.plane import plane_frame

State = dict[str, Tensor]


def _net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    return net.eval()


def _data(count: int = 60) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(count, 4, generator=generator), torch.randint(3, (count,), generator=generator)
    return list(zip(x.split(16), y.split(16), strict=True))


def _vector(state: State) -> Tensor:
    return torch.cat(
        [value.double().reshape(-1) for name, value in state.items() if "running" not in name and "tracked" not in name]
    )


def _beside(state_a: State, state_b: State, share: float) -> State:
    """Returns a state whose foot on the line from A to B is `share` of the way."""
    moved = {name: value.clone() for name, value in _net(9).state_dict().items()}
    along = _vector(state_b) - _vector(state_a)
    rest = _vector(moved) - _vector(state_a)
    excess = float(rest @ along / (along @ along)) - share
    for name, value in moved.items():
        if "running" not in name and "tracked" not in name:
            value -= excess * (state_b[name] - state_a[name])
    return moved


def _states() -> tuple[State, State, State]:
    state_a, state_b = _net(1).state_dict(), _net(2).state_dict()
    return state_a, state_b, _beside(state_a, state_b, 0.5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 50))
def test_coordinates_keep_distances_and_coefficients_recover_states(seed: int) -> None:
    states = [_net(seed + number).state_dict() for number in (0, 100, 200)]
    a, b, aligned = states
    frame = plane_frame(_net(), a, b, aligned)
    corners = torch.tensor([[0, 0], [frame.distance, 0], [frame.across, frame.up]], dtype=torch.float64)
    vectors = torch.stack([_vector(state) for state in states])
    assert torch.allclose(torch.cdist(corners, corners), torch.cdist(vectors, vectors), rtol=1e-6)
    assert frame.up > 0
    shares = frame.coefficients(corners)
    assert torch.allclose(shares, torch.eye(3, dtype=torch.float64), atol=1e-12)
    somewhere = frame.coefficients(torch.randn(7, 2, dtype=torch.float64) * 10)
    assert torch.allclose(somewhere.sum(1), torch.ones(7, dtype=torch.float64))
    for row, state in zip(torch.eye(3, dtype=torch.float64), states, strict=True):
        found, is_clamped = frame.state(row)
        assert not is_clamped
        assert all(torch.equal(found[name], value) for name, value in state.items() if value.is_floating_point())


def test_the_grid_is_what_evaluate_says_at_the_models() -> None:
    a, b, aligned = _states()
    before = [{name: value.clone() for name, value in state.items()} for state in (a, b, aligned)]
    found = plane(_net(), a, b, aligned, _data(), points=5, margin=0.0)
    scores = []
    middle = {name: (a[name] + aligned[name]) / 2 if a[name].is_floating_point() else a[name] for name in a}
    for state in (a, b, aligned, middle):
        net = _net()
        net.load_state_dict(state)
        scores.append(evaluate(net, _data()))
    places = {"A": (0, 0), "B": (0, 4), "aligned B": (4, 2), "fused": (2, 1)}
    for (name, (row, column)), score in zip(places.items(), scores, strict=True):
        model = found["models"][name]
        assert model["loss"] == pytest.approx(score.loss, abs=1e-6)
        assert model["accuracy"] == score.accuracy
        assert found["loss"][row][column] == pytest.approx(score.loss, abs=1e-5)
        assert found["accuracy"][row][column] == pytest.approx(score.accuracy, abs=100 / 60 + 1e-9)
        assert (model["x"], model["y"]) == pytest.approx((found["x"][column], found["y"][row]), abs=1e-5)
    assert found["clamped"] == 0
    for kept, state in zip(before, (a, b, aligned), strict=True):
        assert all(torch.equal(kept[name], value) for name, value in state.items())


def test_swapping_the_models_mirrors_the_plane() -> None:
    a, b, aligned = _states()
    one, other = (plane(_net(), *ends, aligned, _data(), points=5) for ends in ((a, b), (b, a)))
    assert one["x"] == pytest.approx(other["x"])
    assert one["y"] == pytest.approx(other["y"])
    for ours, theirs in zip(one["loss"], other["loss"], strict=True):
        assert ours == pytest.approx(theirs[::-1], abs=1e-4)
    assert one["y"][0] == pytest.approx(-0.25 * one["models"]["aligned B"]["y"])


def test_extrapolated_variances_stay_positive_and_counters_come_from_the_first() -> None:
    a, b, aligned = _states()
    a["1.running_var"].fill_(0.01)
    b["1.running_var"].fill_(4.0)
    a["1.num_batches_tracked"] += 7
    found = plane(_net(), a, b, aligned, _data(), points=5)
    assert 0 < found["clamped"] < 25
    assert all(math.isfinite(value) for row in found["loss"] for value in row)
    frame = plane_frame(_net(), a, b, aligned)
    state, is_clamped = frame.state(torch.tensor([2.0, -1.0, 0.0], dtype=torch.float64))
    assert is_clamped
    assert torch.allclose(state["1.running_var"], torch.full((6,), 1e-4))
    assert state["1.num_batches_tracked"] == 7


def test_tied_parameters_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x))

    nets = [Tied() for _ in range(3)]
    frame = plane_frame(nets[0], *(net.state_dict() for net in nets))
    assert frame.distance == pytest.approx(float((nets[1].table.weight - nets[0].table.weight).detach().norm()))
    tokens = torch.randint(5, (4, 6))
    found = plane(Tied(), *(net.state_dict() for net in nets), [(tokens, tokens)], points=2)
    assert found["models"]["B"]["loss"] == pytest.approx(evaluate(nets[1], [(tokens, tokens)]).loss)


def test_three_models_on_a_line_have_no_plane() -> None:
    a, b, aligned = _states()
    between = {name: (a[name] + b[name]) / 2 if a[name].is_floating_point() else a[name] for name in a}
    with pytest.raises(DataError, match=r"on one line.*along the line only"):
        plane(_net(), a, b, between, _data())
    with pytest.raises(DataError, match=r"A and B are equal"):
        plane(_net(), a, a, aligned, _data())
    with pytest.raises(DataError, match=r"so aligned B is A"):
        plane(_net(), a, b, a, _data())
    with pytest.raises(DataError, match=r"at least 2"):
        plane(_net(), a, b, aligned, _data(), points=1)
    with pytest.raises(DataError, match=r"margin -1"):
        plane(_net(), a, b, aligned, _data(), margin=-1)
    with pytest.raises(ArchitectureError, match=r"'0.bias' is"):
        plane(_net(), a, b, {**aligned, "0.bias": torch.zeros(7)}, _data())


def test_paths_between_a_model_and_its_reordered_copy() -> None:
    net = _net(3)
    net[3].weight.data *= 5
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    copy = {name: value[order] if value.shape[:1] == (6,) else value for name, value in net.state_dict().items()}
    copy["3.weight"] = net.state_dict()["3.weight"][:, order]
    other = _net()
    other.load_state_dict(copy)
    # The labels are what the model says, so that anything else is worse.
    data = [(x, net(x).argmax(1)) for x, _ in _data(200)]
    result = fuse([net, other], solver="weight-matching", example_inputs=data[0][0])
    naive = barrier(_net(), net.state_dict(), copy, data, points=5)
    aligned = barrier(_net(), net.state_dict(), result.aligned_state(1), data, points=5)
    assert naive["error_barrier"] > 1
    assert naive["loss_barrier"] > 1e-3 > 1e-6 > aligned["loss_barrier"] >= 0
    assert aligned["error_barrier"] == 0
    assert aligned["loss"] == pytest.approx([aligned["loss"][0]] * 5, abs=1e-6)


def test_a_repair_is_seen_between_the_ends_and_only_there() -> None:
    a, b, _ = _states()
    seen: list[float] = []

    def halfway(state: State, t: float) -> State:
        seen.append(t)
        assert torch.is_grad_enabled()
        assert torch.allclose(state["0.bias"], (1 - t) * a["0.bias"] + t * b["0.bias"], atol=1e-6)
        return b

    told: list[tuple[int, int, str]] = []
    curve = barrier(_net(), a, b, _data(), points=5, repair=halfway, progress=lambda *step: told.append(step))
    plain = barrier(_net(), a, b, _data(), points=5)
    assert seen == [0.25, 0.5, 0.75]
    assert curve["loss"][0] == plain["loss"][0]
    assert curve["loss"][1:] == [plain["loss"][-1]] * 4
    assert torch.is_grad_enabled()
    assert [done for done, _, _ in told] == [1, 2, 3, 0, 0, 0, 0, 5]
    assert {total for _, total, _ in told} == {5}
    assert "repair at t = 0.25" in told[0][2]


@pytest.mark.parametrize(("entries", "passes"), [(500_000_000, 1), (3 * 80, 3), (1, 7)])
def test_states_share_passes_over_the_data_in_bounded_memory(
    monkeypatch: pytest.MonkeyPatch, entries: int, passes: int
) -> None:
    reads = []

    def data():
        reads.append(1)
        return _data()

    assert 60 < sum(value.numel() for value in _net().state_dict().values()) <= 80
    monkeypatch.setattr(evaluation, "_ENTRIES_AT_ONCE", entries)
    a, b, _ = _states()
    curve = barrier(_net(), a, b, data, points=7)
    assert len(reads) == passes
    monkeypatch.undo()
    assert curve == barrier(_net(), a, b, _data(), points=7)


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-6, 1e3), st.floats(1.5, 400))
def test_levels_are_round_few_and_cover_the_values(low: float, ratio: float) -> None:
    levels = contour_levels(low, low * ratio)
    assert levels[0] <= low
    assert low * ratio <= levels[-1]
    assert levels == sorted(set(levels))
    assert 3 <= len(levels) + 1 <= 19
    assert all(len(f"{value:.6g}".replace(".", "").lstrip("0").rstrip("0").split("e")[0]) <= 3 for value in levels)


def test_colours_end_at_the_naive_path() -> None:
    a, b, aligned = _states()
    found = plane(_net(), a, b, aligned, _data(), points=5, margin=0.0)
    found["loss"] = [[0.1, 0.5, 2.0, 0.7, 0.1], *[[0.2, 0.3, 90.0, math.inf, math.nan]] * 4]
    assert colour_limits(found, found["loss"]) == (0.1, 2.0)
    assert colour_limits(found, [[0.0] * 5] * 5) == (1 / 300, 1.0)
    assert colour_limits(found, [[0.0, 0.0, 60.0, 0.0, 0.0]] * 5) == (0.2, 60.0)
    assert colour_limits(found, [[0.1] * 5] * 5) == pytest.approx((0.1, 0.3))


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_picture_of_a_plane(tmp_path: Path, kind: str) -> None:
    a, b, aligned = _states()
    found = plane(_net(), a, b, aligned, _data(), points=5)
    found["loss"][4][4], found["loss"][4][3] = math.inf, math.nan
    found["accuracy"][0] = [100.0] * 5
    path = plot_plane(found, tmp_path / f"plane.{kind}", title="three nets")
    assert path.stat().st_size > 10_000
    assert list(tmp_path.iterdir()) == [path]
    if kind == "svg":
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    with pytest.raises(RecipeError, match=r"no picture"):
        plot_plane(found, tmp_path / "plane.txt")


def test_picture_of_a_regression_has_one_panel(tmp_path: Path) -> None:
    nets = [nn.Linear(2, 1) for _ in range(3)]
    data = [(torch.randn(4, 2), torch.randn(4, 1))]
    found = plane(nn.Linear(2, 1), *(net.state_dict() for net in nets), data, points=3)
    assert found["accuracy"] is None
    assert {model["accuracy"] for model in found["models"].values()} == {None}
    assert plot_plane(found, str(tmp_path / "plane.png")).exists()
