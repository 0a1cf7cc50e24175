"""Laws of what a refit may return: chosen neurons of all sources, or those of one source; the nearest is taken."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import pytest
import torch
from mergeot_repair.refit.candidates import Candidates, Nearness, parted, sources_to_try
from mergeot_repair.refit.refit import RefitRepair
from torch import Tensor, nn

from mergekit_ot import Aim, DataError, FusionResult, RepairContext, fuse

_BATCH = 80
_FITTED = "its results were fitted to the ensemble."


class _Narrow(nn.Module):
    """A narrow stream with ReLU through many layers, as of a residual network."""

    def __init__(self, depth: int = 4, width: int = 5, classes: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.into = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        for into, out in zip(self.into, self.out, strict=True):
            x = torch.relu(x + out(torch.relu(into(x))))
        return self.last(x)


def _mean(distances: Tensor) -> float:
    return float(distances.mean())


def _inputs(count: int, seed: int) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def _nets(wide: int, scale: float = 4.0) -> list[nn.Module]:
    """Returns random networks with one hidden layer."""
    nets: list[nn.Module] = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        last = nn.Linear(wide, 3)
        with torch.no_grad():
            last.weight.mul_(scale)
        nets.append(nn.Sequential(nn.Linear(8, wide), nn.ReLU(), last).eval())
    return nets


def _trained() -> list[nn.Module]:
    """Returns narrow networks of other neurons each that have learned the same classes."""
    nets: list[nn.Module] = []
    inputs = _inputs(512, 7)
    classes = torch.stack([inputs[:, 0], inputs[:, 1] * inputs[:, 2], inputs[:, 3].abs() - 0.8], 1).argmax(1)
    for seed in (1, 2):
        torch.manual_seed(seed)
        net = _Narrow()
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        for _ in range(250):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs), classes).backward()
            optimizer.step()
        nets.append(net.eval().requires_grad_(False))
    return nets


def _fused(nets: list[nn.Module]) -> FusionResult:
    return fuse(nets, solver="wb", example_inputs=_inputs(_BATCH, 0), device="cpu")


def _context(nets: list[nn.Module], batches: int = 10, weights: tuple[float, float] = (0.5, 0.5)) -> RepairContext:
    result = _fused(nets)
    parts = [(part,) for part in _inputs(_BATCH * batches, 3).split(_BATCH)]
    return result.repair_context(result.state, weights, parts)


@functools.cache
def _narrow() -> tuple[RepairContext, dict[str, dict[str, Tensor]], list[str]]:
    """Returns a context, what each choice makes of it, and what the user was told of the last one, ``auto``."""
    notes: list[str] = []
    context = _context(_trained())
    made = {name: RefitRepair(neurons=name).repair(context) for name in ("mixed", "single")}
    made["auto"] = RefitRepair().repair(dataclasses.replace(context, note=notes.append))
    return context, made, notes


def _source_of(state: dict[str, Tensor], context: RepairContext, last: str) -> int:
    """Returns the source all of whose maps but the last one a state has."""
    inner = [name for name in state if not name.startswith(last)]
    places = [
        number
        for number, source in enumerate(context.sources)
        if all(torch.equal(state[name], source.state[name]) for name in inner)
    ]
    assert len(places) == 1
    return places[0]


def test_it_is_never_farther_on_held_back_inputs_than_a_source_or_chosen_neurons() -> None:
    context, made, _ = _narrow()
    fitted, held_back = parted(context)
    nearness = Nearness(context, held_back)
    mixed = RefitRepair(neurons="mixed").repair(fitted)
    others = [_mean(nearness.of(mixed)), _mean(nearness.of_source(0)), _mean(nearness.of_source(1))]
    assert _mean(nearness.of(made["auto"])) <= min(others) + 1e-12
    # The stream is too narrow for both: without that, the choice would be far from either.
    assert _mean(nearness.of(mixed)) > 1.2 * min(others[1:])


def test_the_neurons_are_then_those_of_one_source_and_the_user_is_told() -> None:
    context, made, notes = _narrow()
    number = _source_of(made["auto"], context, "last.")
    assert _source_of(made["single"], context, "last.") == number
    assert notes[-1].startswith(f"Refit took over all neurons of source {number + 1} and none of another")
    assert "chosen neurons of all sources" in notes[-1]


def test_results_of_one_source_are_fitted_to_the_ensemble() -> None:
    notes: list[str] = []
    context = dataclasses.replace(_context(_nets(wide=48)), note=notes.append)
    state = RefitRepair(neurons="single").repair(context)
    number = _source_of(state, context, "2.")
    assert notes == [f"Refit took over all neurons of source {number + 1} and none of another; {_FITTED}"]
    nearness = Nearness(context, [(_inputs(400, 11),)])
    assert _mean(nearness.of(state)) < 0.8 * _mean(nearness.of_source(number))


def test_where_the_choice_is_nearer_it_is_taken_and_no_source_is_fitted() -> None:
    context = _context(_nets(wide=48))
    notes: list[str] = []
    state = RefitRepair().repair(dataclasses.replace(context, note=notes.append))
    assert any("from source 1" in note and "from source 2" in note for note in notes)
    fitted, held_back = parted(context)
    found = Candidates(fitted, Nearness(context, held_back))
    found.add_mixed(lambda own: RefitRepair(neurons="mixed").repair(own))
    found.add_nearest_of([0, 1], lambda own: pytest.fail("A source was fitted that is farther already."))
    assert all(torch.equal(value, state[name]) for name, value in found.nearest().items())


def test_of_few_batches_none_is_held_back_and_nothing_else_is_tried() -> None:
    context = _context(_nets(wide=8), batches=7)
    assert parted(context) == (context, [])
    one, other = RefitRepair().repair(context), RefitRepair(neurons="mixed").repair(context)
    assert all(torch.equal(one[name], other[name]) for name in one)
    # What is asked for is done.
    _source_of(RefitRepair(neurons="single").repair(context), context, "2.")


def test_parts_are_disjoint_and_whole() -> None:
    context = _context(_nets(wide=8), batches=23)
    fitted, held_back = parted(context)
    count = len(list(context.batches))
    assert len(held_back) == 2
    assert len(list(fitted.batches)) == count - 2
    kept = torch.cat([batch[0] for batch in [*fitted.batches, *held_back]])
    every = torch.cat([batch[0] for batch in context.batches])
    assert torch.equal(kept.sort(0).values, every.sort(0).values)


@pytest.mark.parametrize("change", ["kept", "joined", "weights", "wider"])
def test_sources_that_are_no_state_of_the_fused_network_are_not_tried(change: str) -> None:
    context = _context(_nets(wide=8))
    assert sources_to_try(context, "auto", is_choice=True) == [0, 1]
    assert sources_to_try(context, "mixed", is_choice=True) == sources_to_try(context, "auto", is_choice=False) == []
    wider = {name: torch.cat([value, value]) for name, value in context.fused.items()}
    changed = {
        "kept": dataclasses.replace(context, kept=frozenset({"2.weight"})),
        "joined": dataclasses.replace(context, joined=frozenset({"2.weight"})),
        "weights": dataclasses.replace(context, model_weights=(1.0, 0.0)),
        "wider": dataclasses.replace(context, fused=wider),
    }[change]
    assert sources_to_try(changed, "auto", is_choice=True) == []
    if change == "weights":
        # One source is all there is.
        assert sources_to_try(changed, "single", is_choice=True) == []
    else:
        with pytest.raises(DataError, match="neurons=single"):
            sources_to_try(changed, "single", is_choice=True)


def test_distances_are_divergences_of_classes_and_squares_of_numbers() -> None:
    sure, unsure = _context(_nets(scale=400.0, wide=8)), _context(_nets(scale=0.01, wide=8))
    batch = [(_inputs(50, 5),)]
    assert "divergence" in Nearness(sure, batch).name
    assert Nearness(unsure, batch).name == "mean squared error"
    assert "divergence" in Nearness(dataclasses.replace(unsure, aim=Aim.PROBABILITIES), batch).name
    outputs = [unsure.instance(source.state)(batch[0][0]).detach() for source in unsure.sources]
    expected = float(((outputs[0] - outputs[1]) / 2).square().mean())
    assert _mean(Nearness(unsure, batch).of_source(0)) == pytest.approx(expected, rel=1e-5)
    logs = [
        source_of(batch[0][0]).double().log_softmax(1) for source_of in (sure.instance(s.state) for s in sure.sources)
    ]
    goal = (logs[0].exp() + logs[1].exp()) / 2
    divergence = nn.functional.kl_div(logs[1], goal, reduction="batchmean")
    assert _mean(Nearness(sure, batch).of_source(1)) == pytest.approx(float(divergence.detach()), rel=1e-5)


def test_the_ensemble_is_weighted() -> None:
    context = _context(_nets(wide=8), weights=(0.9, 0.1))
    nearness = Nearness(context, [(_inputs(50, 5),)])
    assert _mean(nearness.of_source(0)) < _mean(nearness.of_source(1))


class _Uncertain(Nearness):
    """Finds every fused state a little farther than the nearest source in the mean, and nearer for half the samples."""

    def of(self, state: Mapping[str, Tensor]) -> Tensor:
        nearest = min((self.of_source(number) for number in (0, 1)), key=_mean)
        return nearest + nearest.mean() * (0.01 + torch.tensor([1.0, -1.0]).repeat(len(nearest) // 2))


def test_a_source_that_is_nearer_by_chance_is_not_taken() -> None:
    context = _context(_nets(wide=8))
    found = Candidates(context, _Uncertain(context, [(_inputs(_BATCH, 5),)]))
    state = dict(context.fused)
    found.add_mixed(lambda own: state)
    found.add_nearest_of([0, 1], lambda own: pytest.fail("A source was fitted that is nearer by chance."))
    assert found.nearest() is state
