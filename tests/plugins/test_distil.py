"""Laws of the repair that trains towards the ensemble."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergeot_repair.distil.distil import DistilRepair
from mergeot_repair.distil.ensemble import Ensemble, Results, makes_classes
from mergeot_repair.distil.training import Schedule, divergence, train
from signed import traced_once
from sklearn.datasets import load_digits
from test_cli import Run, run  # noqa: F401
from torch import Tensor, nn

from mergekit_ot import Aim, FusionResult, RecipeError, RepairContext, fuse

pytestmark = pytest.mark.usefixtures(traced_once.__name__)

_SHORT = {"epochs": 4, "learning_rate": 0.003}


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    inputs, targets = load_digits(return_X_y=True)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    return torch.tensor(inputs / 16).float()[order], torch.tensor(targets)[order]


@functools.cache
def _perceptrons() -> tuple[nn.Module, nn.Module]:
    rows, classes = _digits()
    return _trained(rows[:600], classes[:600], 0), _trained(rows[600:1200], classes[600:1200], 1)


def _trained(rows: Tensor, classes: Tensor, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(15):
        for batch in torch.randperm(len(rows)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(rows[batch]), classes[batch]).backward()
            optimizer.step()
    return net.eval()


def _fused(nets: Iterable[nn.Module], data: Tensor | tuple[Tensor, ...], **options: object) -> FusionResult:
    given = {"solver": "wb", "repair": "distil", "device": "cpu", "repair_options": _SHORT, **options}
    return fuse(list(nets), data=[data], **given)


def _context(nets: Iterable[nn.Module], data: Tensor, **changes: object) -> RepairContext:
    """Returns what a repair of the mean of networks works with."""
    batches = [(part,) for part in data.split(50) if len(part) == 50]
    result = fuse(list(nets), solver="average", example_inputs=batches[0], device="cpu")
    return replace(result.repair_context(result.state, (0.5, 0.5), batches), **changes)


def _divergence(nets: Iterable[nn.Module], model: nn.Module, rows: Tensor) -> float:
    with torch.no_grad():
        goal = torch.stack([net(rows).double().softmax(1) for net in nets]).mean(0)
        return float((goal * (goal.log() - model(rows).double().log_softmax(1))).sum(1).mean())


@pytest.mark.slow
def test_classes_come_nearer_to_the_mean_probabilities_than_by_refit() -> None:
    nets, (rows, _) = _perceptrons(), _digits()
    result = _fused(nets, rows[:1200])
    refitted = _fused(nets, rows[:1200], repair="refit", repair_options={}).model()
    fresh = rows[1200:]
    assert _divergence(nets, result.model(), fresh) < 0.8 * _divergence(nets, refitted, fresh)
    assert result.repair_comparison is not None
    assert result.repair_comparison.aim is Aim.PROBABILITIES
    assert any("not one-shot" in note for note in result.notes)


@pytest.mark.slow
def test_numbers_come_nearer_to_the_mean_outputs() -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 2)) for _ in range(2)]
    data, fresh = torch.randn(600, 4), torch.randn(300, 4)
    with torch.no_grad():
        goal = (nets[0](fresh) + nets[1](fresh)) / 2
        errors = [
            float((_fused(nets, data, repair=repair, repair_options=options).model()(fresh) - goal).square().mean())
            for repair, options in (("refit", {}), ("distil", {"epochs": 10, "learning_rate": 0.01}))
        ]
    assert errors[1] < 0.7 * errors[0]


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**31), rate=st.sampled_from([1e-3, 1e2]))
def test_what_is_held_back_is_never_farther_than_the_start(seed: int, rate: float) -> None:
    """A learning rate of a hundred throws any network far away."""
    context = _context(_perceptrons(), _digits()[0][:300], seed=seed, aim=Aim.PROBABILITIES)
    state = DistilRepair(start="fused", epochs=1, learning_rate=rate).repair(context)
    ensemble = Ensemble(context, list(context.batches), True, "cpu")
    held = torch.randperm(300, generator=torch.Generator().manual_seed(seed))[:50]
    before, after = (divergence(context.instance(each), ensemble, held) for each in (context.fused, state))
    assert after <= before
    if rate > 1:
        assert all(torch.equal(state[name], context.fused[name]) for name in state)
    else:
        assert after < before


def test_a_network_that_is_the_ensemble_stays_to_the_bit() -> None:
    net, (rows, _) = _perceptrons()[0], _digits()
    result = _fused([net, net], rows[:300])
    assert all(torch.equal(result.state[name], value) for name, value in net.state_dict().items())


def test_one_hot_weights_give_the_source() -> None:
    nets, (rows, _) = _perceptrons(), _digits()
    result = _fused(nets, rows[:300], model_weights=(1.0, 0.0))
    assert all(torch.equal(result.state[name], value) for name, value in nets[0].state_dict().items())


def test_buffers_stay_those_of_the_start_and_all_else_is_trained() -> None:
    context = _context(_perceptrons(), _digits()[0][:600], aim=Aim.PROBABILITIES, kept=frozenset({"0.bias"}))
    state = DistilRepair(start="fused", epochs=1).repair(context)
    same = {name for name, value in state.items() if torch.equal(value, context.fused[name])}
    assert same == {"1.running_mean", "1.running_var", "1.num_batches_tracked", "0.bias"}


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    context = _context(_perceptrons(), _digits()[0][:300], aim=Aim.PROBABILITIES)
    repair = DistilRepair(start="fused", epochs=1)
    first, again, other = (repair.repair(replace(context, seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])


class _Masked(nn.Module):
    """Tokens and a mask of those that count; a prediction for each token, and a number."""

    def __init__(self, seed: int, is_plain: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.hidden, self.head = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 9)
        self.is_plain = is_plain

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Returns logits, and their mean beside them where the results are not plain."""
        made = self.embedding(tokens) * mask[..., None]
        logits = self.head(torch.tanh(self.hidden(made.cumsum(1))))
        return logits if self.is_plain else (logits, logits.mean((1, 2)))


@pytest.mark.parametrize("is_plain", [True, False], ids=["tokens", "two outputs"])
def test_whole_numbers_masks_and_several_outputs(is_plain: bool) -> None:
    nets = [_Masked(seed, is_plain).eval() for seed in (0, 1)]
    torch.manual_seed(2)
    data = torch.randint(9, (300, 6)), torch.rand(300, 6) > 0.2
    result = _fused(nets, (data, None), repair_options={**_SHORT, "start": "fused"})
    found = result.repair_comparison
    assert found is not None
    assert found.aim is (Aim.PROBABILITIES if is_plain else Aim.OUTPUTS)
    assert found.is_written
    assert found.repaired.plain < 0.8 * found.unrepaired.plain
    nets[0].load_state_dict(result.state)


def test_half_precision_is_trained_in_single_and_written_in_half() -> None:
    nets, (rows, _) = _perceptrons(), _digits()
    context = _context(nets, rows[:300], aim=Aim.PROBABILITIES)
    half = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10)).bfloat16().eval()

    def instance(state: dict[str, Tensor]) -> nn.Module:
        half.load_state_dict(state)
        return half

    fused = {name: value.to(half.state_dict()[name].dtype) for name, value in context.fused.items()}
    state = DistilRepair(start="fused", epochs=1).repair(replace(context, instance=instance, fused=fused))
    assert {value.dtype for value in state.values()} == {torch.bfloat16, torch.long}
    assert not torch.equal(state["0.weight"], fused["0.weight"])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), axis=st.sampled_from([1, -1]), are_probabilities=st.booleans())
def test_the_loss_of_classes_is_torchs_divergence(seed: int, axis: int, are_probabilities: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, others = (torch.randn(3, 4, 5, generator=generator).double() for _ in range(2))
    goal = others.movedim(axis, -1).softmax(-1)
    own = logits.softmax(axis) if are_probabilities else logits
    found = Results(axis, are_probabilities).losses([own], [goal])
    rows = logits.movedim(axis, -1).log_softmax(-1).reshape(-1, goal.shape[-1])
    expected = nn.functional.kl_div(rows, goal.reshape(-1, goal.shape[-1]), reduction="batchmean")
    assert float(found) == pytest.approx(float(expected), rel=1e-9)


def test_goals_are_the_same_whether_they_are_kept_or_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    context = _context(_perceptrons(), _digits()[0][:300])
    numbers = torch.tensor([250, 3, 77])
    kept = Ensemble(context, list(context.batches), True, "cpu")
    monkeypatch.setattr("mergeot_repair.distil.ensemble._MOST_KEPT", 0)
    made = Ensemble(context, list(context.batches), True, "cpu")
    assert kept.kept is not None
    assert made.kept is None
    (one,), (other,) = kept.goals(numbers), made.goals(numbers)
    assert torch.allclose(one, other, atol=1e-6)
    assert torch.equal(kept.inputs(numbers)[0], _digits()[0][numbers])


@pytest.mark.parametrize("minutes", [0.0, 1e-9])
def test_a_limit_of_time_ends_the_training(minutes: float) -> None:
    context = _context(_perceptrons(), _digits()[0][:300])
    ensemble = Ensemble(context, list(context.batches), True, "cpu")
    told: list[tuple[float, float, float]] = []
    parts = torch.arange(50, 300), torch.arange(50)
    model = context.instance(context.fused).requires_grad_(True)
    train(model, ensemble, parts, Schedule(2, minutes, 1e-3, 50, 0), lambda *each: told.append(each))
    assert [round(share, 6) for share, *_ in told] == ([] if minutes else [step / 10 for step in range(1, 11)])


def test_a_network_that_is_thrown_away_goes_back_and_is_trained_more_slowly() -> None:
    """A rate that is far too high is lowered until the training gains."""
    context = _context(_perceptrons(), _digits()[0][:300], aim=Aim.PROBABILITIES)
    told: list[float] = []
    repair = DistilRepair(start="fused", epochs=8, learning_rate=3.0)
    state = repair.repair(replace(context, progress=lambda _, __, text: told.append(float(text.split()[1]))))
    ensemble = Ensemble(context, list(context.batches), True, "cpu")
    before, after = (divergence(context.instance(each), ensemble, torch.arange(300)) for each in (context.fused, state))
    assert told[0] > 1.5 * before
    assert after < before


def test_answers_that_are_sure_are_classes_and_others_are_numbers() -> None:
    rows = _digits()[0][:200]
    assert makes_classes(_context(_perceptrons(), rows))
    assert not makes_classes(_context([nn.Linear(64, 10).eval() for _ in range(2)], rows))


def test_the_command_trains_and_says_so(run: Run) -> None:  # noqa: F811
    given = ("fuse", "a.pt", "b.pt", *run.arch, "--data", "data.npz", "--repair", "distil", "-o", "out.pt")
    content = run.json(*given, "--repair-option", "epochs=1", "--repair-option", "start=fused")
    assert content["repair"]["name"] == "distil"
    assert "epochs of repair 'distil' is 0" in run.fails(*given, "--repair-option", "epochs=0")


def test_options_are_checked() -> None:
    nets, (rows, _) = _perceptrons(), _digits()
    with pytest.raises(RecipeError, match="start"):
        _fused(nets, rows[:300], repair_options={"start": "average"})
