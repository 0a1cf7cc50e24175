"""The laws of a fusion where neurons may be negated: order and signs that were planted are found."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from mergeot_measures.measures import WeightsMeasure
from signed import (
    ROWS,
    SEQUENCES,
    Recurrent,
    TanhStream,
    layers,
    moved,
    planted_signs,
    random_couplings,
    randomised,
    relative_error,
    traced,
    traced_once,
)
from torch import Tensor, nn

from mergekit_ot import (
    BarycenterProblem,
    Coupling,
    GroupView,
    Permutation,
    Plan,
    Scope,
    Sign,
    fuse,
    fused_measure,
    load_checkpoint,
)
from mergekit_ot.cli.app import main
from mergekit_ot.fusion.alignment import Alignment
from mergekit_ot.fusion.moving import transport_parameter

Make = Callable[..., nn.Module]

pytestmark = pytest.mark.usefixtures(traced_once.__name__)

# Each takes a factor that widens its groups.
CASES: dict[str, tuple[Make, Tensor]] = {
    "mlp": (lambda factor=1: layers(nn.Tanh(), nn.Tanh(), sizes=(4, 6 * factor, 5 * factor, 2)), ROWS),
    "rnn": (lambda factor=1: Recurrent(nn.RNN, 6 * factor), SEQUENCES),
    "lstm": (lambda factor=1: Recurrent(nn.LSTM, 6 * factor), SEQUENCES),
    "gru, two layers": (lambda factor=1: Recurrent(nn.GRU, 6 * factor, num_layers=2), SEQUENCES),
    "lstm, both directions": (lambda factor=1: Recurrent(nn.LSTM, 6 * factor, bidirectional=True), SEQUENCES),
}
PLANTED = {
    **CASES,
    "lstm, projected": (lambda: Recurrent(nn.LSTM, 7, proj_size=4), SEQUENCES),
    "residual stream": (TanhStream, ROWS),
}


@functools.cache
def planted_pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A network, and the same function in another order and with other signs."""
    make, inputs = PLANTED[name]
    model = randomised(make(), 1, 2.0)
    return model, planted_signs(model, make, inputs)


def is_signed(couplings: tuple[object, ...]) -> bool:
    return any(isinstance(coupling, Permutation | Plan) and coupling.sign is not None for coupling in couplings)


def parameter_of(model: nn.Module, _: int, name: str) -> Tensor:
    return model.get_parameter(name).detach()


@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("name", PLANTED)
def test_what_a_moved_group_is_seen_by_is_what_its_measure_becomes(name: str, scope: Scope) -> None:
    """The numbers that a measure says change sign, and only they, change sign with the neurons of a network."""
    make, inputs = PLANTED[name]
    model = randomised(make(), 12)
    graph, signs = traced(make, inputs)
    for key, coupling in random_couplings(graph, signs, 0).items():
        others = {k: (Permutation.identity(g.size),) for k, g in graph.free_groups.items() if k != key}
        alignment = Alignment((graph,), graph, others, {Sign.name: signs})
        plain, expected = (
            WeightsMeasure().measure(GroupView(key, alignment, scope, partial(parameter_of, each), True))[0]
            for each in (model, moved(model, graph, {key: coupling}, signs))
        )
        found = fused_measure(BarycenterProblem((plain,), (1.0,), coupling.target_size), (coupling,))
        torch.testing.assert_close(found.support, expected.support)
        torch.testing.assert_close(found.structure, expected.structure)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_order_and_planted_signs_are_recovered(name: str) -> None:
    inputs = PLANTED[name][1]
    model, other = planted_pair(name)
    result = fuse([model, other], solver="gwb", example_inputs=inputs)
    assert relative_error(result.model(), model, inputs) <= 1e-6
    assert result.aligned_sources_max_error is not None
    assert result.aligned_sources_max_error <= 1e-6
    for key, couplings in result.alignment.couplings.items():
        assert is_signed(couplings) == (key in result.alignment.signs)


@pytest.mark.parametrize("name", ["mlp", "gru, two layers"])
def test_without_signs_they_are_not(name: str) -> None:
    """The control: the order alone does not bring the function back."""
    inputs = PLANTED[name][1]
    model, other = planted_pair(name)
    result = fuse([model, other], solver="gwb", solver_options={"signs": False}, example_inputs=inputs)
    assert relative_error(result.model(), model, inputs) > 0.1
    assert result.alignment.signs == {}
    assert not any(map(is_signed, result.alignment.couplings.values()))


def test_three_copies_with_signs_of_their_own_are_recovered() -> None:
    make, inputs = CASES["rnn"]
    model = randomised(make(), 4, 2.0)
    copies = [planted_signs(model, make, inputs, seed) for seed in (0, 1)]
    result = fuse([model, *copies], solver="gwb", example_inputs=inputs)
    assert relative_error(result.model(), model, inputs) <= 1e-6


@pytest.mark.parametrize(("name", "solver"), [("mlp", "refinement"), ("rnn", "gwb"), ("lstm", "gwb")])
def test_a_model_fused_with_itself_is_itself(name: str, solver: str) -> None:
    make, inputs = CASES[name]
    model = randomised(make(), 2)
    result = fuse([model, model], solver=solver, example_inputs=inputs)
    for key, tensor in model.state_dict().items():
        assert torch.allclose(result.state[key], tensor, atol=1e-6), key


@pytest.mark.parametrize(("name", "one"), [("mlp", 1), ("rnn", 0), ("lstm", 1)])
def test_one_hot_model_weights_return_that_source(name: str, one: int) -> None:
    make, inputs = CASES[name]
    models = [randomised(make(), seed) for seed in (3, 4)]
    result = fuse(models, solver="gwb", example_inputs=inputs, model_weights=[1.0 - one, float(one)])
    assert relative_error(result.model(), models[one], inputs) <= 1e-6


@pytest.mark.parametrize(("name", "solver"), [("mlp", "gwb"), ("rnn", "refinement"), ("lstm", "gwb")])
def test_aligned_sources_compute_what_the_sources_compute(name: str, solver: str) -> None:
    make, inputs = CASES[name]
    models = [randomised(make(), seed) for seed in (5, 6, 7)]
    result = fuse(models, solver=solver, example_inputs=inputs)
    assert any(map(is_signed, result.alignment.couplings.values()))
    for number, model in enumerate(models):
        aligned = make().eval()
        aligned.load_state_dict(result.aligned_state(number))
        assert relative_error(aligned, model, torch.randn_like(inputs)) <= 2e-6


@pytest.mark.parametrize("name", ["mlp", "rnn"])
def test_the_order_of_two_sources_does_not_matter(name: str) -> None:
    make, inputs = CASES[name]
    models = [randomised(make(), seed) for seed in (8, 9)]
    one, other = (fuse(pair, solver="gwb", example_inputs=inputs) for pair in (models, models[::-1]))
    assert relative_error(one.model(), other.model(), inputs) <= 1e-5


def duplicated(name: str, model: nn.Module) -> nn.Module:
    """The same function with every neuron twice, once negated, each copy sending half of what the neuron sent."""
    make, inputs = CASES[name]
    graph, signs = traced(make, inputs)
    wide, _ = traced(lambda: make(2), inputs)
    generator = torch.Generator().manual_seed(0)
    couplings = {}
    for key, group in graph.free_groups.items():
        order = torch.randperm(2 * group.size, generator=generator)
        plan = torch.eye(group.size).repeat(2, 1)[order] / (2 * group.size)
        sign = torch.ones(2 * group.size).where(order < group.size, torch.tensor(-1.0))
        couplings[key] = (Plan(plan, sign=sign[:, None].expand_as(plan).clone()),)
    alignment = Alignment((graph,), wide, couplings, {Sign.name: signs})
    double = make(2).eval()
    double.load_state_dict({k: transport_parameter(v, k, alignment, 0) for k, v in model.state_dict().items()})
    assert relative_error(double, model, inputs) < 1e-6
    return double


@pytest.mark.parametrize(
    ("name", "target"), [("mlp", 0), ("mlp", 1), ("rnn", 0), ("rnn", 1), ("lstm", 0), ("gru, two layers", 1)]
)
def test_a_planted_duplicate_with_negated_copies_keeps_the_function(name: str, target: int) -> None:
    make, inputs = CASES[name]
    model = randomised(make(), 10, 2.0)
    models = [model, duplicated(name, model)]
    result = fuse(models, solver="gwb", example_inputs=inputs, target=target)
    assert result.state.keys() == models[target].state_dict().keys()
    assert all(result.state[key].shape == tensor.shape for key, tensor in models[target].state_dict().items())
    assert relative_error(result.model(), model, inputs) <= 1e-6


@pytest.mark.parametrize("target", [0, 1])
def test_recurrent_layers_of_different_width_fuse_with_signs(target: int) -> None:
    models = [randomised(Recurrent(nn.RNN, width), width) for width in (5, 8)]
    options = {"keep_apart": False}
    result = fuse(models, solver="gwb", solver_options=options, example_inputs=SEQUENCES, target=target)
    (couplings,) = result.alignment.couplings.values()
    soft = couplings[1 - target]
    assert isinstance(soft, Coupling)
    assert isinstance(soft, Plan)
    assert soft.sign is not None
    assert set(soft.sign.unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(soft.source_marginal(), torch.full((soft.source_size,), 1 / soft.source_size))
    torch.testing.assert_close(soft.target_marginal(), torch.full((soft.target_size,), 1 / soft.target_size))
    with torch.no_grad():
        assert torch.isfinite(result.model()(SEQUENCES)).all()


_NETWORKS = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(3, 6, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.cell(x.unflatten(1, (6, 3)))[0].mean(1))
"""


def test_the_command_line_writes_a_source_with_signs_that_computes_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> dict:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--arch", "networks.py:Net", "--data", "data.npz", "--json"])
        out, err = capsys.readouterr()
        assert not stopped.value.code, err
        return json.loads(out)

    Path("networks.py").write_text(_NETWORKS)
    model, other = planted_pair("lstm")
    apart = randomised(CASES["lstm"][0](), 11, 2.0)
    for name, each in (("a", model), ("b", other), ("c", apart)):
        torch.save(each.state_dict(), f"{name}.pt")
    x = torch.randn(60, 6, 3)
    with torch.no_grad():
        labels = apart(x).argmax(1)
    rows = x.flatten(1).numpy()
    np.savez("data.npz", x_train=rows, y_train=labels.numpy(), x_test=rows, y_test=labels.numpy())

    found = run("align", "a.pt", "b.pt", "c.pt", "-o", "aligned", "--solver", "gwb")
    assert all(each["max_error"] < 1e-6 for each in found["outputs"])
    aligned = load_checkpoint("aligned/b.pt").state
    assert all(torch.allclose(aligned[name], tensor, atol=1e-6) for name, tensor in model.state_dict().items())
    written = CASES["lstm"][0]().eval()
    written.load_state_dict(dict(load_checkpoint("aligned/c.pt").state))
    assert relative_error(written, apart, x) < 1e-6
    before, after = run("eval", "c.pt", "aligned/c.pt")["models"]
    assert after["accuracy"] == before["accuracy"] == 100.0
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)

    curve = run("barrier", "a.pt", "b.pt", "--align", "gwb", "--points", "3")
    assert curve["aligned"]["loss"] == pytest.approx([curve["loss"][0]] * 3, rel=1e-4)
    assert curve["loss_barrier"] > 1e-2 > 1e-6 > curve["aligned"]["loss_barrier"]


class GatedStream(nn.Module):
    """A stream behind RMSNorms, with neurons that are products of an activated gate and a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.norms = nn.ModuleList(nn.RMSNorm(6) for _ in range(2))
        self.gate, self.up, self.down = nn.Linear(6, 7), nn.Linear(6, 7), nn.Linear(7, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        normed = self.norms[0](x)
        x = x + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))
        return self.head(self.norms[1](x))


# By how many groups have signs: of the products, and of the stream, too.
WASSERSTEIN: dict[str, tuple[Make, Tensor, int]] = {
    "tanh": (*CASES["mlp"], 2),
    "gated, behind RMSNorms": (GatedStream, ROWS, 2),
}


@pytest.mark.parametrize("name", WASSERSTEIN)
@pytest.mark.parametrize("copies", [1, 2])
def test_wb_finds_planted_signs_where_it_is_asked_for_them(name: str, copies: int) -> None:
    make, inputs, count = WASSERSTEIN[name]
    model = randomised(make(), 5)
    others = [planted_signs(model, make, inputs, seed) for seed in range(copies)]
    options = {"signs": True, "max_sweeps": 20}
    found = fuse([model, *others], solver="wb", example_inputs=inputs, solver_options=options)
    assert len(found.alignment.signs) == count
    assert relative_error(found.model(), model, inputs) < 1e-4
    without = fuse([model, *others], solver="wb", example_inputs=inputs, solver_options={"max_sweeps": 20})
    assert without.alignment.signs == {}
    assert relative_error(without.model(), model, inputs) > 1e-2


def test_wb_is_the_same_to_the_bit_where_nothing_may_be_negated() -> None:
    models = [randomised(layers(nn.ReLU(), nn.ReLU()), seed) for seed in range(3)]
    fused = [
        fuse(models, solver="wb", example_inputs=ROWS, solver_options={"signs": signs}).state for signs in (False, True)
    ]
    assert all(torch.equal(fused[0][name], fused[1][name]) for name in fused[0])


def test_entropic_couplings_of_wb_negate_as_well() -> None:
    model = randomised(WASSERSTEIN["tanh"][0](), 5)
    copy = planted_signs(model, *WASSERSTEIN["tanh"][:2])
    options = {"signs": True, "epsilon": 1e-3}
    found = fuse([model, copy], solver="wb", example_inputs=ROWS, solver_options=options)
    assert relative_error(found.model(), model, ROWS) < 0.05
