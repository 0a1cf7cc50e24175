"""What `refit` fits the results of classifiers to: the mean of the outputs, or of the probabilities."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergeot_repair.programs.maps import MapFinder
from mergeot_repair.refit.results import Classifier, fitted_classifier, log_probabilities, result_maps
from sklearn.datasets import load_digits
from test_cli import Run, run  # noqa: F401
from torch import Tensor, nn

from mergekit_ot import (
    DataError,
    Disagreement,
    FusionResult,
    RecipeError,
    default_manager,
    evaluate,
    fuse,
    load_checkpoint,
    probabilities_of,
    trace_model,
)
from mergekit_ot.transport.options import option_hints, words_of

_SEEDS = st.integers(0, 2**31)


@functools.cache
def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns inputs and targets to train with, and others to test with."""
    inputs, targets = load_digits(return_X_y=True)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    rows, classes = torch.tensor(inputs / 16).float()[order], torch.tensor(targets)[order]
    return rows[:1200], classes[:1200], rows[1200:], classes[1200:]


def _trained(kept: Tensor, seed: int) -> nn.Module:
    """Returns a perceptron that was trained on some of the digits."""
    rows, classes, *_ = _digits()
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    places = kept.nonzero().squeeze(1)
    for _ in range(25):
        for batch in places[torch.randperm(len(places))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(rows[batch]), classes[batch]).backward()
            optimizer.step()
    return net.eval()


@functools.cache
def _skewed() -> tuple[nn.Module, ...]:
    """Two networks that share out the digits of each class unequally, as clients do: by a Dirichlet distribution."""
    classes = _digits()[1]
    torch.manual_seed(3)
    shares = torch.distributions.Dirichlet(torch.full((10, 2), 0.3)).sample()[:, 0]
    first = torch.rand(len(classes), generator=torch.Generator().manual_seed(2)) < shares[classes]
    return _trained(first, 0), _trained(~first, 1)


@functools.cache
def _specialists() -> tuple[nn.Module, ...]:
    """Two networks of which each saw few digits of five classes, but enough to know them."""
    classes = _digits()[1]
    rare = torch.rand(len(classes), generator=torch.Generator().manual_seed(1)) < 0.2
    return _trained((classes < 5) | rare, 0), _trained((classes >= 5) | rare, 1)


@functools.cache
def _alike() -> tuple[nn.Module, ...]:
    """Two networks that saw half of the data each, at random."""
    first = torch.rand(len(_digits()[1]), generator=torch.Generator().manual_seed(2)) < 0.5
    return _trained(first, 0), _trained(~first, 1)


@functools.cache
def _refitted(nets: tuple[nn.Module, ...], target: str) -> FusionResult:
    options = {"target": target}
    return fuse(nets, solver="wb", data=[_digits()[0]], repair="refit", repair_options=options, device="cpu")


def _accuracy(nets: tuple[nn.Module, ...], target: str) -> float:
    net = copy.deepcopy(nets[0])
    net.load_state_dict(_refitted(nets, target).state)
    return evaluate(net, [_digits()[2:]]).accuracy or 0.0


_TARGETS = ("outputs", "log-probabilities", "probabilities")


def test_sources_that_saw_other_classes_are_better_fitted_to_their_probabilities() -> None:
    by_target = {target: _accuracy(_skewed(), target) for target in (*_TARGETS, "auto")}
    assert by_target["probabilities"] > by_target["outputs"] + 3
    assert by_target["log-probabilities"] > by_target["outputs"] + 3
    assert by_target["auto"] > by_target["outputs"] + 3


def test_a_linear_map_that_cannot_make_the_probabilities_is_fitted_to_outputs() -> None:
    by_target = {target: _accuracy(_specialists(), target) for target in (*_TARGETS, "auto")}
    assert by_target["auto"] >= max(by_target.values()) - 0.5


def test_the_choice_is_one_of_the_targets_and_told() -> None:
    for nets in (_skewed(), _specialists()):
        found = _refitted(nets, "auto")
        states = {target: _refitted(nets, target).state for target in _TARGETS}
        equal = [
            target for target, state in states.items() if all(torch.equal(found.state[n], state[n]) for n in state)
        ]
        (note,) = [note for note in found.notes if "sure of different classes" in note]
        words = {
            "outputs": "mean of their outputs",
            "log-probabilities": "logarithm",
            "probabilities": "mean of their p",
        }
        assert len(equal) == 1
        assert words[equal[0]] in note


def test_sources_that_saw_the_same_are_fitted_to_their_outputs() -> None:
    found, asked = _refitted(_alike(), "auto"), _refitted(_alike(), "outputs")
    assert not any("sure of different classes" in note for note in found.notes)
    assert all(torch.equal(found.state[name], asked.state[name]) for name in asked.state)
    assert found.repair_comparison.aim.value == "outputs"


def test_what_is_nearer_in_its_predictions_is_written() -> None:
    found = _refitted(_skewed(), "probabilities").repair_comparison
    repaired, unrepaired, *_ = found.predictions
    assert found.is_written
    assert repaired.divergence < unrepaired.divergence
    # By its outputs it is farther, since it is not brought near to them.
    assert found.as_json()["aim"] == "probabilities"


def test_a_network_without_classes_has_no_probabilities() -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.Sigmoid()).eval() for _ in range(2)]
    data = [torch.randn(200, 4)]
    with pytest.raises(DataError, match="target=probabilities of repair 'refit' is about classes"):
        fuse(nets, data=data, repair="refit", repair_options={"target": "probabilities"})
    assert fuse(nets, data=data, repair="refit").repair_comparison is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "outputs"}, "Unknown option of repair 'refit' 'targets'. Did you mean 'target'"),
        ({"target": "logits"}, "Option target of repair 'refit' is 'logits': 'auto' or 'outputs' or"),
    ],
)
def test_an_option_of_a_repair_is_checked(options: dict[str, object], message: str) -> None:
    nets = [nn.Linear(3, 2), nn.Linear(3, 2)]
    with pytest.raises(RecipeError) as raised:
        fuse(nets, data=[torch.randn(20, 3)], repair="refit", repair_options=options)
    assert message in str(raised.value)


def test_options_without_a_repair_or_of_one_that_has_none_are_refused() -> None:
    nets, data = [nn.Linear(3, 2), nn.Linear(3, 2)], [torch.randn(20, 3)]
    with pytest.raises(RecipeError, match="'target' is given and no repair: add --repair NAME"):
        fuse(nets, data=data, repair_options={"target": "outputs"})
    with pytest.raises(RecipeError, match="repair 'rescale' has no options: 'target'"):
        fuse(nets, data=data, repair="rescale", repair_options={"target": "outputs"})


class _Shaped(nn.Module):
    """A linear map, and what stands behind it."""

    def __init__(self, end: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.end = end

    def forward(self, inputs: Tensor) -> object:
        return self.end(self.linear(inputs))


@pytest.mark.parametrize(
    ("end", "is_found"),
    [
        (lambda made: made, True),
        (lambda made: made.log_softmax(1), True),
        (lambda made: made.softmax(-1), True),
        (lambda made: made.reshape(-1, 1, 6), True),
        (lambda made: made.softmax(0), False),
        (lambda made: made.reshape(-1, 2, 3), False),
        (lambda made: made.relu(), False),
        (lambda made: made * 2, False),
        (lambda made: (made, made.softmax(1)), False),
        (lambda made: torch.stack(made.chunk(2, 1)), False),
    ],
)
def test_a_map_makes_classes_where_nothing_but_a_softmax_stands_behind_it(
    end: Callable[[Tensor], object], is_found: bool
) -> None:
    program = trace_model(_Shaped(end), torch.randn(3, 4)).program
    assert bool(result_maps(program, MapFinder(program).find())) == is_found


@settings(max_examples=20, deadline=None)
@given(_SEEDS, st.integers(2, 6), st.booleans())
def test_probabilities_that_a_map_can_make_are_recovered(seed: int, classes: int, has_shift: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(400, 5, generator=generator) * 10 ** float(torch.rand(1, generator=generator) * 4 - 2)
    weight, shift = torch.randn(classes, 5, generator=generator), torch.randn(classes, generator=generator)
    weight = weight / inputs.std()
    goals = (inputs @ weight.T + (shift if has_shift else 0)).softmax(1)
    start = Classifier(torch.zeros(classes, 5), torch.zeros(classes) if has_shift else None)
    found = fitted_classifier(start, inputs, goals)
    made = found.logits(inputs).softmax(1)
    divergence = (goals * (goals.log() - made.log())).sum(1).mean()
    assert divergence < 1e-3
    assert (found.shift is None) == (not has_shift)


def test_a_fit_is_the_optimum_of_its_objective() -> None:
    """Moving any weight by a little makes it worse: of the divergence alone, where the pull is next to nothing."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(600, 4, generator=generator)
    goals = torch.randn(600, 3, generator=generator).mul(0.3).softmax(1)
    found = fitted_classifier(Classifier(torch.zeros(3, 4), torch.zeros(3)), inputs, goals)
    weight = found.weight.double().requires_grad_()
    shift = found.shift.double().requires_grad_()
    loss = -(goals.double() * (inputs.double() @ weight.T + shift).log_softmax(1)).sum(1).mean()
    loss.backward()
    start = -(goals.double() * torch.full((1, 3), 1 / 3).double().log()).sum(1).mean()
    assert loss < start
    # The strongest pull of the grid leaves a gradient of a tenth of the weights.
    assert weight.grad.abs().max() <= 0.11 * weight.abs().max()


@settings(max_examples=30, deadline=None)
@given(_SEEDS, st.integers(2, 4), st.integers(3, 6))
def test_logarithms_of_probabilities_give_them_back(seed: int, samples: int, classes: int) -> None:
    drawn = torch.rand(samples, classes, generator=torch.Generator().manual_seed(seed)).double() + 0.01
    probabilities = drawn / drawn.sum(1, keepdim=True)
    logits = log_probabilities(probabilities)
    assert torch.allclose(logits.softmax(1), probabilities)
    assert torch.allclose(logits.mean(1), torch.zeros(samples).double(), atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(_SEEDS, st.integers(2, 4))
def test_noise_is_no_systematic_disagreement(seed: int, sources: int) -> None:
    """However much sources differ: where it is by chance, they saw the same things."""
    generator = torch.Generator().manual_seed(seed)
    found = Disagreement(sources)
    for _ in range(4):
        found.add([probabilities_of(6 * torch.randn(500, 5, generator=generator), 1) for _ in range(sources)])
    assert found.share > 0.5
    assert 0 <= found.systematic < 0.2
    assert not found.saw_different_things


def test_sources_that_agree_saw_the_same_things() -> None:
    found = Disagreement(2)
    same = probabilities_of(torch.randn(100, 5, generator=torch.Generator().manual_seed(0)), 1)
    found.add([same, same])
    assert (found.share, found.systematic, found.saw_different_things) == (0, 0, False)


def test_the_page_lists_the_options_of_repairs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "explanation" / "repairs.md").read_text(encoding="utf-8")
    manager = default_manager()
    for name in manager.repairs:
        hints = option_hints(manager.get("repair", name))
        section = page.partition(f"### Options of `{name}`")[2].partition("\n#")[0]
        rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|", section, flags=re.MULTILINE)
        assert {option: words for option, _, words in rows} == {option: words_of(hints[option]) for option in hints}


def test_options_of_a_repair_on_the_command_line(run: Run) -> None:  # noqa: F811
    given = ("fuse", "a.pt", "b.pt", *run.arch, "--data", "data.npz", "--repair", "refit")
    content = run.json(*given, "--repair-option", "target=outputs", "--report", "report", "-o", "out.pt")
    assert content["repair"]["aim"] == "outputs"
    assert load_checkpoint("out.pt").provenance["repair_options"] == {"target": "outputs"}
    recipe = Path("report/recipe.yaml").read_text(encoding="utf-8")
    assert "repair_options:\n  target: outputs" in recipe
    assert "--repair-option target=outputs" in Path("report/report.md").read_text(encoding="utf-8")
    assert "Did you mean 'target'" in run.fails(*given, "--repair-option", "targt=outputs")
    assert "repair" in run.fails("fuse", "a.pt", "b.pt", *run.arch, "--repair-option", "target=outputs")


@pytest.mark.parametrize("seed", range(4))
def test_networks_that_learned_nothing_saw_nothing_different(seed: int) -> None:
    """Untrained networks answer differently, and each always the same; but they are sure of nothing."""
    torch.manual_seed(seed)
    nets = [nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 5)).eval() for _ in range(2)]
    found = Disagreement(2)
    inputs = torch.randn(1000, 6)
    with torch.no_grad():
        found.add([probabilities_of(2 * net(inputs), 1) for net in nets])
    assert found.share > 0.3
    assert not found.saw_different_things
