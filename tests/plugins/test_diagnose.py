"""``mergeot diagnose``: what it says of networks whose relation is known, and that what it advises can be run."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from commands import commands
from mergeot_diagnose import diagnose, plot_diagnosis
from mergeot_diagnose.findings import Basin, Diagnosis
from mergeot_diagnose.network import NetworkKind, kind_of
from mergeot_diagnose.paths import Path as StraightPath
from mergeot_diagnose.rules import RULES, Facts, advise
from mergeot_diagnose.samples import read_samples
from mergeot_diagnose.showing import expectations, facts, reasons
from mergeot_diagnose.similarity import linear_cka
from torch import Tensor, nn

from mergekit_ot import DataError, RecipeError, default_manager, save_checkpoint, trace_model

ROOT = Path(__file__).parents[2]
run = pytest.fixture(commands)


def net(width: int = 24, classes: int = 5, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, classes))
    for layer in (model[0], model[2], model[4]):
        # As drawn, biases decide the answers alone.
        layer.weight.data *= 4
    return model


def reordered(model: nn.Sequential, seed: int = 0) -> nn.Sequential:
    """Returns the same function with the neurons of the hidden layers in another order."""
    moved, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for layer, reader in ((0, 2), (2, 4)):
        made, read = moved[layer], moved[reader]
        order = torch.randperm(made.weight.shape[0], generator=generator)
        made.weight.data, made.bias.data = made.weight.data[order], made.bias.data[order]
        read.weight.data = read.weight.data[:, order]
    return moved


def noisy(model: nn.Sequential, size: float = 0.05) -> nn.Sequential:
    moved = copy.deepcopy(model)
    for weight in moved.parameters():
        weight.data += size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return moved


def inputs(count: int = 120) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(2))


def test_cka_is_that_of_the_formula_and_knows_no_order_no_rotation_and_no_scale() -> None:
    first, second = torch.randn(2, 7, 40, dtype=torch.double)
    first, second = (rows - rows.mean(1, keepdim=True) for rows in (first, second))
    own, other = first.T @ first, second.T @ second
    expected = (own * other).sum() / (own.norm() * other.norm())
    assert linear_cka(first, second) == pytest.approx(float(expected))
    rotation = torch.linalg.qr(torch.randn(7, 7, dtype=torch.double)).Q
    assert linear_cka(first, 3 * rotation @ first) == pytest.approx(1)
    assert linear_cka(3 * rotation @ first, second) == pytest.approx(float(expected))
    assert linear_cka(first, torch.zeros_like(first)) == 0


def test_a_fine_tune_is_in_one_basin_with_its_base_with_and_without_data() -> None:
    pair = [net(), noisy(net())]
    for given in ({"example_inputs": inputs(2)}, {"data": [inputs()]}):
        found = diagnose(pair, **given)
        (both,) = found.pairs
        assert both.basin is Basin.ONE
        assert both.weights.held == pytest.approx(1, abs=1e-6)
        assert both.weights.cosine > 0.9 > 0.3 > both.weights.random
        assert [layer.same_place for layer in both.layers] == [1.0, 1.0]
        assert found.advice.solver == "average"
        assert not found.is_labelled
    assert all(layer.cka > 0.95 for layer in both.layers)


@pytest.fixture(scope="module")
def planted() -> Diagnosis:
    """A network, and the same function with its neurons in another order, on inputs with labels."""
    model = net()
    return diagnose([model, reordered(model)], data=[(inputs(), model(inputs()).argmax(1))])


def test_a_planted_order_is_seen_and_taken_back(planted: Diagnosis) -> None:
    """Apart as they stand, equal when aligned, layers as similar as can be."""
    (both,) = planted.pairs
    assert both.basin is Basin.APART
    assert both.weights.held < 0.25
    assert both.weights.aligned == pytest.approx(1, abs=1e-5)
    assert max(layer.same_place for layer in both.layers) < 0.3
    assert [layer.cka for layer in both.layers] == pytest.approx([1, 1], abs=1e-4)
    assert both.naive.error_barrier > 5
    assert both.aligned.error_barrier == pytest.approx(0, abs=0.01)
    assert planted.advice.flags == ["--solver", "activation-matching", "--repair", "refit"]
    assert planted.disagreement == 0


def test_labels_give_the_accuracy_and_what_to_expect(planted: Diagnosis) -> None:
    assert planted.is_labelled
    assert planted.accuracies == (100.0, 100.0)
    assert planted.expected_accuracy == (96.0, 100.0)
    assert "100.0 %" in " ".join(facts(planted))
    assert "96.0 to 100.0 %" in " ".join(expectations(planted))


def test_the_first_network_is_compared_with_each_of_the_others() -> None:
    model = net()
    found = diagnose([model, noisy(model), reordered(model)], example_inputs=inputs(2))
    assert [pair.basin for pair in found.pairs] == [Basin.ONE, Basin.APART]
    assert found.pairs[1].names == ("source 0", "source 2")
    assert found.advice.rule == "no data"


def test_networks_of_other_widths_and_heads() -> None:
    wider = diagnose([net(24), net(30, seed=1)], data=[inputs()])
    assert wider.pairs[0].naive is None
    assert wider.pairs[0].weights is None or wider.pairs[0].weights.cosine is None
    assert wider.advice.repair == "refit"
    assert advise(Facts(wider.kind, None, has_data=False, has_equal_widths=False)).flags == ["--solver", "wb"]
    heads = diagnose([net(), net(classes=3, seed=1)], data=[inputs()])
    assert heads.advice.head == "both"
    assert heads.advice.flags[-2:] == ["--head", "both"]


class ByHand(nn.Module):
    """A recurrent cell without a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(3 + 8, 8), nn.Linear(8, 2)

    def forward(self, steps: Tensor) -> Tensor:
        state = torch.zeros(steps.shape[0], 8)
        for step in range(steps.shape[1]):
            state = torch.tanh(self.cell(torch.cat([steps[:, step], state], 1)))
        return self.head(state)


class WithAttention(nn.Module):
    """One head of attention that is written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(3, 4) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, steps: Tensor) -> Tensor:
        scores = torch.bmm(self.query(steps), self.key(steps).transpose(1, 2)).softmax(-1)
        return self.head(torch.bmm(scores, self.value(steps)).mean(1))


@pytest.mark.parametrize(
    ("model", "shape", "words"),
    [
        (ByHand(), (2, 4, 3), "recurrent"),
        (WithAttention(), (2, 4, 3), "with attention"),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), (2, 3), "BatchNorm"),
        (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), (2, 3), "feed-forward"),
    ],
    ids=["recurrent", "attention", "statistics", "plain"],
)
def test_the_kind_of_network_is_seen_in_its_graph(model: nn.Module, shape: tuple[int, ...], words: str) -> None:
    kind = kind_of(trace_model(model, torch.randn(*shape)))
    assert words in kind.words
    assert sum((kind.has_statistics, kind.has_attention, kind.is_recurrent)) == (words != "feed-forward")


def all_facts() -> list[Facts]:
    kinds = [
        NetworkKind(*flags, groups, 100.0, ())
        for flags in itertools.product((False, True), repeat=3)
        for groups in (0, 2)
    ]
    flags = list(itertools.product((None, False, True), *[(False, True)] * 4))
    return [Facts(kind, *each) for kind in kinds for each in flags]


def test_every_rule_is_reached_and_names_what_there_is() -> None:
    manager = default_manager()
    decided = {advise(known).rule for known in all_facts()}
    assert decided == {rule.name for rule in RULES}
    for rule in RULES:
        assert rule.solver in manager.solvers
        assert rule.repair == "none" or rule.repair in manager.repairs
        assert list((ROOT / "docs").rglob(f"{rule.evidence}.md"))
        assert rule.expected is None or rule.expected[0] < rule.expected[1]


def test_the_page_has_the_rules_in_their_order() -> None:
    (page,) = (ROOT / "docs").rglob("diagnosing.md")
    section = page.read_text(encoding="utf-8").split("\n## The advice\n")[1].split("\n## ")[0]
    rows = [[cell.strip(" `") for cell in line.split("|")[2:5]] for line in section.splitlines() if line[:2] == "| "]
    told = [
        [
            rule.solver,
            rule.repair,
            "not measured" if rule.expected is None else "{:+.0f} to {:+.0f}".format(*rule.expected),
        ]
        for rule in RULES
    ]
    assert rows[1:] == [[each.replace("+0", "0") for each in row] for row in told]


def test_no_advice_asks_for_what_is_not_there() -> None:
    manager = default_manager()
    for known in all_facts():
        advice = advise(known)
        needs_data = advice.repair != "none" or manager.get("solver", advice.solver).measure == "activations"
        assert known.has_data or not needs_data
        assert (advice.head == "both") == (not known.has_equal_heads)
        # An average of neurons in different orders is never advised where there is something to align.
        if advice.solver == "average":
            assert known.is_one_basin is True or known.kind.free_groups == 0


def test_a_path_without_classes_is_flat_by_its_loss() -> None:
    steps = (0.0, 0.5, 1.0)
    assert StraightPath(steps, (1.0, 1.05, 1.0), None, 0.05, None).is_flat
    assert not StraightPath(steps, (1.0, 1.5, 1.0), None, 0.5, None).is_flat


def test_a_flat_path_between_neurons_in_orders_of_their_own_is_no_basin() -> None:
    """One class for nearly all inputs: nothing can be wrong on the way, and nothing follows."""
    first = net()
    first[4].bias.data[0] += 1000
    (both,) = diagnose([first, reordered(first)], data=[inputs(20)]).pairs
    assert both.naive.is_flat
    assert both.weights.held < 0.25
    assert both.basin is Basin.UNKNOWN
    assert any("may be luck" in sentence for sentence in reasons(both))


def test_samples_have_one_size_and_too_few_are_refused() -> None:
    batches = [(torch.zeros(60, 3), torch.zeros(60)), (torch.zeros(60, 4), torch.zeros(60)), torch.zeros(90, 3)]
    assert [len(batch[0]) for batch in read_samples(batches[:2], 500).inputs] == [20, 20, 20]
    samples = read_samples(batches, 500)
    assert [len(batch[0]) for batch in samples.inputs] == [20] * 7
    assert samples.targets == ()
    for few in ([], [torch.zeros(1, 3)]):
        with pytest.raises(DataError, match="fewer than two"):
            read_samples(few, 500)
    with pytest.raises(DataError, match="neither"):
        read_samples([("words", "more")], 500)


def test_what_is_missing_is_said() -> None:
    with pytest.raises(RecipeError, match="two or more"):
        diagnose([net()], example_inputs=inputs(2))
    with pytest.raises(RecipeError, match="example_inputs"):
        diagnose([net(), net()])


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    manager = default_manager()
    make = manager.architectures["mlp"].load()
    for name, seed in (("a.pt", 0), ("b.pt", 1)):
        torch.manual_seed(seed)
        arguments = {"sizes": (64, 12, 10)}
        save_checkpoint(make(**arguments), name, architecture="mlp", arguments=arguments, input_shape=(1, 8, 8))
    return ["a.pt", "b.pt"]


def test_the_command_tells_draws_and_advises_what_runs(files: list[str], run: Callable[..., str]) -> None:
    told = run("diagnose", *files, "--data", "digits", "--samples", "100", "--figure", "both.svg")
    assert "not in one basin" in told
    assert "at the same place" in told
    picture = Path("both.svg").read_text()
    assert "straight path" in picture
    content = json.loads(run("diagnose", *files, "--data", "digits", "--samples", "100", "--json"))
    assert {"names", "kind", "pairs", "advice", "accuracies", "expected_accuracy", "command"} <= content.keys()
    assert content["samples"] == 100
    command = shlex.split(content["command"])
    assert command[:4] == ["mergeot", "fuse", *files]
    run(*command[1:])
    assert Path("fused.pt").is_file()


def test_the_command_without_data(files: list[str], run: Callable[..., str]) -> None:
    content = json.loads(run("diagnose", *files, "--json"))
    assert content["pairs"][0]["naive"] is None
    assert "--data" not in shlex.split(content["command"])


def test_networks_whose_function_is_only_guessed_are_compared_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a.pt", 0), ("b.pt", 1)):
        torch.save({f"layers.{key}": value for key, value in net(seed=seed).state_dict().items()}, name)
    content = json.loads(run("diagnose", "a.pt", "b.pt", "--strip-prefix", "layers.", "--json"))
    assert content["pairs"][0]["basin"] == "apart"
    assert "--strip-prefix layers." in content["command"]
    assert "only guessed" in run("diagnose", "a.pt", "b.pt", "--data", "digits", status=1)


def test_the_command_refuses_in_one_sentence(files: list[str], run: Callable[..., str]) -> None:
    assert "name two or more" in run("diagnose", files[0], status=1)
    assert "is no picture" in run("diagnose", *files, "--figure", "both.txt", status=1)
    Path("mine.svg").write_text("mine")
    assert "not written by mergeot" in run("diagnose", *files, "--figure", "mine.svg", status=1)
    assert Path("mine.svg").read_text() == "mine"
    run("diagnose", *files, "--input-shape", "1,x", status=2)


def test_a_picture_of_hostile_names_is_drawn(planted: Diagnosis, tmp_path: Path) -> None:
    pair = dataclasses.replace(planted.pairs[0], names=("$\\frac$.pt", "</text>.pt"))
    many = dataclasses.replace(pair, layers=pair.layers * 30)
    drawn = plot_diagnosis(dataclasses.replace(planted, pairs=(many,)), tmp_path / "odd.svg").read_text()
    assert "the first 40 of 60 layers" in drawn
    ElementTree.fromstring(drawn)
