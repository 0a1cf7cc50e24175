"""``mergeot experiments``: trainings are cached, cells are kept, tables hold the right numbers, errors are clear."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mergeot_experiments.results.tables as tables
import mergeot_experiments.running.runner as runner
import mergeot_experiments.running.store as store_module
import mergeot_experiments.workflow as workflow
import pytest
import torch
from mergeot_experiments.catalogue.descriptions import DIGITS, FULL, QUICK, Design, Experiment, Method, Setting
from mergeot_experiments.catalogue.registry import EXPERIMENTS, choose_scale
from mergeot_experiments.catalogue.seeds import seeded, windows
from mergeot_experiments.results.tables import Summary, make_table
from mergeot_experiments.running.runner import Order
from mergeot_experiments.running.store import SOURCES_VERSION, Store, code_version, content_of, sources_of
from mergeot_experiments.sources.data import IMAGE_SETS, image_set, special_part
from mergeot_experiments.sources.sequences import data_set
from mergeot_experiments.sources.training import Training, trained

from mergekit_ot import PluginManager, default_manager, evaluate, hookimpl, resolve_architecture
from mergekit_ot.cli.app import main
from mergekit_ot.errors import RecipeError

TINY = Training("mlp", {"sizes": "64-8-10", "bias": False}, "digits", 1, 2, "sgd", 0.1, 0.9)


def _tiny() -> Design:
    pairs = seeded([TINY, TINY], windows((1, 2, 3), 2, 3))
    settings = (
        Setting("", "even", pairs),
        Setting("", "uneven", pairs, model_weights=(0.75, 0.25), more=(Method("wb", {"epsilon": 0.5}),)),
    )
    return Design(settings, (Method("average"), Method("wb")))


def _larger() -> Design:
    pairs = seeded([TINY, TINY], windows((1, 2, 3, 4), 2, 4))
    return Design((Setting("", "even", pairs),), (Method("average"),))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, no data folder, and an experiment that takes a second."""
    monkeypatch.setenv("MERGEOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MERGEOT_DATA", raising=False)
    tiny = Experiment("tiny", "Tiny perceptrons", "for tests", {QUICK: _tiny, FULL: _larger, DIGITS: _tiny})
    monkeypatch.setitem(EXPERIMENTS, "tiny", tiny)
    return tmp_path / "cache"


@pytest.fixture
def fusions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The solvers of all fusions that a run asks for; they return the first source at once."""
    seen: list[str] = []

    def fuse(models: Any, **options: Any) -> Any:
        seen.append(options["solver"])
        return SimpleNamespace(model=lambda: models[0], seconds=0.5, aligned_sources_max_error=0.0, groups=())

    monkeypatch.setattr(runner, "fuse", fuse)
    return seen


@pytest.fixture
def mergeot(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs ``mergeot experiments …`` in this process: exit status, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(["experiments", *arguments])
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


def _never() -> Any:
    raise AssertionError("the images were asked for though the network is in the cache")


def test_a_network_is_trained_once_and_comes_back_equal() -> None:
    told: list[str] = []
    images = IMAGE_SETS["digits"].training_images
    first = trained(TINY, images, told.append)
    assert len(told) == TINY.epochs
    again = trained(TINY, _never, told.append)
    assert len(told) == TINY.epochs
    assert not again.training
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    fresh = resolve_architecture("mlp", arguments=TINY.arguments)()
    test = IMAGE_SETS["digits"].test_batches()
    assert evaluate(again, test).accuracy > 70 > 40 > evaluate(fresh, test).accuracy


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"epochs": 1},
        {"rate": 0.2},
        {"momentum": 0.0},
        {"decay": 0.1},
        {"batch": 32},
        {"optimizer": "adam"},
        {"data": "digits-rest"},
        {"arguments": {"sizes": "64-8-10", "bias": True}},
        {"milestones": (0.5,)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_field_trains_anew(change: dict[str, Any]) -> None:
    other = replace(TINY, **change)
    assert other.path != TINY.path
    first, second = (
        trained(training, image_set(training.data).training_images, lambda _: None) for training in (TINY, other)
    )
    weights = [model.state_dict()["fc1.weight"] for model in (first, second)]
    assert not torch.equal(*weights)


def test_keys_of_trainings_stay() -> None:
    # Networks that took hours lie in caches under these names: a change needs a reason.
    described = Training(
        "mlp", {"sizes": "784-400-200-100-10", "bias": False}, "mnist-normalised-54000", 43, 20, "sgd", 0.05, 0.5
    )
    assert described.key == "mlp-d0c8eb49765b91f1"
    assert EXPERIMENTS["mlp"].designs[QUICK]().settings[0].sources[0][0] == described


def test_unknown_optimizer() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'adam'"):
        replace(TINY, optimizer="adan")


def test_mean_and_sample_deviation() -> None:
    summary = Summary.of([90.0, 92.0, 97.0])
    assert summary.mean == pytest.approx(93.0)
    assert summary.deviation == pytest.approx(13**0.5)  # (9 + 1 + 16) / (3 - 1)
    assert summary.text(expected=3) == "93.00 ± 3.61"
    assert summary.text(expected=5) == "93.00 ± 3.61 (3)"
    assert Summary.of([90.0]).text(expected=1) == "90.00"


def test_parts_of_uneven_data() -> None:
    whole, special, rest = (IMAGE_SETS[f"digits{part}"].training_images() for part in ("", "-special", "-rest"))
    counts, of_special, of_rest = (torch.bincount(targets, minlength=10) for _, targets in (whole, special, rest))
    assert torch.equal(of_special + of_rest, counts)
    assert of_special[4] == counts[4]
    others = counts.sum() - counts[4]
    assert of_special.sum() - of_special[4] == round(0.1 * int(others))
    assert torch.equal(special_part(whole[1]), special_part(whole[1]))
    assert len(IMAGE_SETS["digits-special"].test_batches()[0][1]) == 500


def test_run_measures_every_cell_and_tells_it(mergeot: Any) -> None:
    status, out, err = mergeot("run", "tiny", "--json")
    assert status == 0, err
    content = json.loads(out)
    (table,) = content["experiments"]
    assert (table["name"], table["scale"], table["sets"], content["not_possible"]) == ("tiny", "digits", 3, [])
    rows = {row["name"]: row for row in table["rows"]}
    assert list(rows) == ["sources, mean", "ensemble", "average", "wb", "wb, epsilon 0.5"]
    assert list(rows["wb"]["accuracy"]) == ["even", "uneven"]
    assert list(rows["wb, epsilon 0.5"]["accuracy"]) == ["uneven"]
    assert rows["wb, epsilon 0.5"]["command"] == (
        "mergeot experiments run tiny --solver wb --solver-option epsilon=0.5"
    )
    even = rows["wb"]["accuracy"]["even"]
    assert even["count"] == len(even["values"]) == 3
    assert even["mean"] == pytest.approx(statistics.fmean(even["values"]))
    assert even["sd"] == pytest.approx(statistics.stdev(even["values"]))
    assert "MERGEOT_DATA is not set" in err
    assert "say nothing about MNIST" in err
    assert re.search(r"\[21/21, 0 s left\].* %", err)  # 15 fusions, and 3 sets of sources with two kinds of weights


def test_cells_hold_what_they_say(mergeot: Any) -> None:
    """The accuracies of the table are those of networks that are averaged and scored here."""
    _, out, _ = mergeot("run", "tiny", "--solver", "average", "--json")
    rows = {row["name"]: row for row in json.loads(out)["experiments"][0]["rows"]}
    test = IMAGE_SETS["digits"].test_batches()
    for column, share in (("even", 0.5), ("uneven", 0.75)):
        for number, (first, second) in enumerate(_tiny().settings[0].sources):
            models = [trained(one, _never, lambda _: None) for one in (first, second)]
            fused = resolve_architecture("mlp", arguments=TINY.arguments)()
            states = [model.state_dict() for model in models]
            fused.load_state_dict({name: share * states[0][name] + (1 - share) * states[1][name] for name in states[0]})
            found = rows["average"]["accuracy"][column]["values"][number]
            assert found == pytest.approx(evaluate(fused, test).accuracy, abs=0.21)  # a prediction may tip by rounding
            each = [score.accuracy for score in evaluate(models, test)]
            assert rows["sources, mean"]["accuracy"][column]["values"][number] == pytest.approx(sum(each) / 2)
            with torch.no_grad():
                chance = sum(
                    weight * model(test[0][0]).softmax(1)
                    for weight, model in zip((share, 1 - share), models, strict=True)
                )
            right = (chance.argmax(1) == test[0][1]).double().mean() * 100
            assert rows["ensemble"]["accuracy"][column]["values"][number] == pytest.approx(float(right), abs=0.21)


def test_a_run_goes_on_where_it_was(mergeot: Any, fusions: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    measure, left = runner._measure, [5]

    def stopped(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise RecipeError("stopped for the test")
        return measure(*arguments)

    monkeypatch.setattr(runner, "_measure", stopped)
    order = ("run", "tiny", "--solver", "average")
    assert mergeot(*order)[0] == 1
    assert 0 < len(fusions) < 6
    monkeypatch.setattr(runner, "_measure", measure)
    assert mergeot(*order)[0] == 0
    assert len(fusions) == 6
    status, out, _ = mergeot(*order, "--json")
    assert status == 0
    assert len(fusions) == 6
    assert json.loads(out)["experiments"][0]["rows"]
    assert mergeot(*order, "--seeds", "1", "--again")[0] == 0
    assert len(fusions) == 8


def test_other_code_and_other_options_are_measured_anew(
    mergeot: Any, fusions: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = ("run", "tiny", "--seeds", "1", "--solver", "wb")
    assert mergeot(*order)[0] == 0
    assert len(fusions) == 2
    assert mergeot(*order, "--solver-option", "starts=1")[0] == 0
    assert len(fusions) == 4
    for module in (runner, tables):
        monkeypatch.setattr(module, "code_version", lambda *_: "another")
    assert mergeot(*order)[0] == 0
    assert len(fusions) == 6
    # The table shows what the installed code measured, and marks what only an earlier one did.
    made = make_table(EXPERIMENTS["tiny"], DIGITS, Store(cache / "results"), default_manager())
    assert {row.name: row.is_current for row in made.rows if row.method} == {"wb": True, "wb, starts 1": False}
    assert [len(row.summaries["even"].values) for row in made.rows if row.method] == [1, 1]
    page = mergeot("table")[1]
    assert "| wb † |" not in page
    assert "| wb, starts 1 † |" in page
    assert "† measured by an earlier version" in page


def test_a_damaged_cell_is_measured_again(mergeot: Any, fusions: list[str], cache: Path) -> None:
    order = ("run", "tiny", "--seeds", "1", "--solver", "average")
    assert mergeot(*order)[0] == 0
    for path in (cache / "results").glob("*.json"):
        path.write_text(path.read_text()[:50])
    assert mergeot(*order)[0] == 0
    assert len(fusions) == 4


@pytest.mark.slow
def test_page_of_all_results(mergeot: Any, fusions: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What this one has at full scale is that of 'tiny', and nobody ran its own.
    alone = Design((Setting("", "even", seeded([TINY, TINY], [(8, 9)])),), (Method("average"),))
    other = Experiment("other", "Never run", "for tests", {QUICK: lambda: alone, FULL: _tiny})
    monkeypatch.setitem(EXPERIMENTS, "other", other)
    assert mergeot("run", "tiny", "--seeds", "2", "--solver", "wb")[0] == 0
    # Digits and full hold nothing of their own here: they share the cells of quick.
    assert mergeot("run", "tiny", "--full", "--seeds", "2", "--solver", "wb")[0] == 0
    status, out, err = mergeot("table", "--output", str(tmp_path / "results.md"))
    assert (status, out.strip()) == (0, str(tmp_path / "results.md")), err
    page = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "## Tiny perceptrons\n" in page
    assert "Never run" not in page
    assert "otfusion" not in page
    assert "`mlp` (sizes 64-8-10, bias False) on `digits`: 2 epochs, sgd at 0.1, momentum 0.9, batches of 64" in page
    lines = [line for line in page.splitlines() if line.startswith("| wb")]
    assert lines, page
    assert re.search(r"\| \d+\.\d\d ± \d+\.\d\d \(2\) \| .*\| `mergeot experiments run tiny --solver wb`", lines[0])
    assert mergeot("table", "tiny")[1].strip() == page.removesuffix("<!-- written by mergeot -->\n").strip()
    assert f"Cannot write '{tmp_path}'" in mergeot("table", "--output", str(tmp_path))[2]
    assert [table["scale"] for table in json.loads(mergeot("table", "--json")[1])["experiments"]] == [QUICK]
    assert mergeot("run", "tiny", "--full", "--solver", "wb")[0] == 0
    tables = json.loads(mergeot("table", "--json")[1])["experiments"]
    assert [(table["scale"], table["sets"], table["rows"][-1]["command"]) for table in tables] == [
        (QUICK, 3, "mergeot experiments run tiny --solver wb"),
        (FULL, 4, "mergeot experiments run tiny --full --solver wb"),
    ]


@pytest.mark.slow
def test_what_cannot_be_combined_is_told_and_the_rest_goes_on(mergeot: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = replace(TINY, arguments={"sizes": "64-12-10", "bias": False})
    settings = (
        Setting("", "into narrow", seeded([TINY, wide], [(1, 2)]), roles=("narrow", "wide")),
        Setting("", "into wide", seeded([wide, TINY], [(2, 1)]), roles=("wide", "narrow")),
    )
    design = Design(settings, (Method("average"), Method("wb")))
    widths = Experiment("unequal", "Unequal", "for tests", {QUICK: lambda: design})
    monkeypatch.setitem(EXPERIMENTS, "unequal", widths)
    status, out, err = mergeot("run", "unequal", "--json")
    assert status == 0, err
    content = json.loads(out)
    rows = {row["name"]: row["accuracy"] for row in content["experiments"][0]["rows"]}
    assert list(rows) == ["source narrow", "source wide", "ensemble", "wb"]
    for role, training in (("narrow", TINY), ("wide", wide)):
        model = trained(replace(training, seed=1 if role == "narrow" else 2), _never, lambda _: None)
        accuracy = evaluate(model, IMAGE_SETS["digits"].test_batches()).accuracy
        assert {found["mean"] for found in rows[f"source {role}"].values()} == {accuracy}
    assert rows["source narrow"] != rows["source wide"]
    assert len(content["not_possible"]) == 2
    assert "Choose a solver that couples neurons" in content["not_possible"][0]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("run", "tinny"), 1, "Unknown experiment 'tinny'. Did you mean 'tiny'"),
        (("run", "tiny", "--seeds", "4"), 1, "has 3 sets of sources at the digits scale, and 4 were asked for"),
        (("run", "mlp", "--full"), 1, "MERGEOT_DATA names none. Set MERGEOT_DATA to a folder"),
        (("run", "tiny", "--solver", "wbb"), 1, "Unknown solver 'wbb'. Did you mean 'wb'"),
        (("run", "tiny", "--solver", "wb", "--solver-option", "epsilo=1"), 1, "Did you mean 'epsilon'"),
        (("run", "tiny", "--solver-option", "epsilon=1"), 2, "name the --solver"),
        (("run", "tiny", "--solver", "wb", "--solver-option", "epsilon"), 2, "not KEY=VALUE"),
        (("run", "tiny", "--refine"), 2, "name the --solver"),
        (("run",), 2, "Missing argument"),
        (("table",), 1, "Nothing is measured yet"),
        (("table", "mlp"), 1, "Nothing is measured yet of mlp"),
    ],
)
def test_clear_errors(mergeot: Any, cache: Path, arguments: tuple[str, ...], status: int, message: str) -> None:
    found, out, err = mergeot(*arguments)
    assert (found, out) == (status, "")
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert not cache.exists()  # nothing was trained before the error was found


def test_a_data_folder_without_the_file(mergeot: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEOT_DATA", str(tmp_path))
    status, _, err = mergeot("run", "mlp", "--seeds", "1")
    assert status == 1
    assert f"cannot read '{tmp_path / 'mnist.npz'}'" in err


def test_list_names_all(mergeot: Any) -> None:
    status, out, err = mergeot("list")
    assert (status, out) == (0, "")
    assert all(f"{name}: {experiment.title}" in err for name, experiment in EXPERIMENTS.items())
    listed = {row["name"]: row for row in json.loads(mergeot("list", "--json")[1])["experiments"]}
    assert list(listed) == list(EXPERIMENTS)
    assert listed["growth"]["sets"][QUICK] == 5


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "tiny"])
def test_designs_are_sound(name: str) -> None:
    """Every scale has sets enough (one where it trains for an hour); what it names exists; no set holds one twice."""
    experiment = EXPERIMENTS[name]
    assert {QUICK, FULL} <= set(experiment.designs)
    manager = default_manager()
    for make in experiment.designs.values():
        design = make()
        is_long = any(training.data == "cifar10" for training in design.settings[0].sources[0])
        assert design.repetitions >= (1 if is_long else 5)
        assert all(method.solver in manager.solvers for method in design.all_methods)
        places = [(setting.row, setting.column) for setting in design.settings]
        assert len(set(places)) == len(places)
        for setting in design.settings:
            sets = [tuple(training.key for training in one_set) for one_set in setting.sources]
            assert len(set(sets)) == len(sets)
            for one_set in setting.sources:
                assert len({training.key for training in one_set}) == len(one_set)
                assert len({training.seed for training in one_set}) == len(one_set)
                assert len({data_set(training.data).source for training in one_set}) == 1
            networks = [(one.architecture, one.arguments) for one in setting.sources[0]]
            if setting.target is not None:
                networks.append((setting.target.architecture, setting.target.arguments))
            for architecture, arguments in networks:
                with torch.device("meta"):
                    assert list(resolve_architecture(architecture, manager, arguments)().parameters())
            weights = setting.model_weights or (1.0,)
            assert sum(weights) == pytest.approx(1)
            assert len(setting.roles) in (0, len(setting.sources[0]))


def test_digits_take_the_place_of_quick_only(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, residual = EXPERIMENTS["mlp"], EXPERIMENTS["residual"]
    assert [choose_scale(one, is_full) for one in (mlp, residual) for is_full in (False, True)] == [
        DIGITS,
        FULL,
        QUICK,
        FULL,
    ]
    monkeypatch.setenv("MERGEOT_DATA", "somewhere")
    assert choose_scale(mlp, is_full=False) == QUICK


def test_flags_of_a_method_give_the_method_back(mergeot: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Order] = []
    monkeypatch.setattr(workflow, "run_orders", lambda orders, *_: seen.extend(orders) or [])
    methods = (
        Method("wb"),
        Method("gwb", {"alpha": 0.5, "gradient": "half", "starts": 2}, refine=True, restarts=3, measure="activations"),
        Method("gwb", {"signs": False}),
        Method("wb", repair="refit"),
    )
    for method in methods:
        assert mergeot("run", "tiny", *method.flags)[0] == 0
    assert [order.methods for order in seen] == [(method,) for method in methods]
    assert len({method.name for method in methods}) == 4


def test_cells_are_found_by_content_alone(cache: Path) -> None:
    first, second = _tiny().settings
    store = Store(cache / "results")
    store.put(content_of(first, 0), Method("wb", {"epsilon": 0.5}), "v", {"accuracy": 1.0, "seconds": 2.0})
    store.put(sources_of(first, 0), None, SOURCES_VERSION, {"each": [1.0], "ensemble": 1.0})
    again, renamed = Store(cache / "results"), replace(first, row="other", column="name")
    found = again.find(content_of(renamed, 0), Method("wb", {"epsilon": 0.5}), "v")
    assert found is not None
    assert found.result == {"accuracy": 1.0, "seconds": 2.0}
    assert again.find(content_of(first, 0), Method("wb"), "v") is None
    assert again.find(content_of(first, 0), Method("wb", {"epsilon": 0.5}), "w") is None
    assert again.find(content_of(second, 0), Method("wb", {"epsilon": 0.5}), "v") is None
    assert again.find(content_of(first, 1), Method("wb", {"epsilon": 0.5}), "v") is None
    assert [cell.method for cell in again.of_content(content_of(first, 0))] == [Method("wb", {"epsilon": 0.5})]


def test_a_repair_makes_another_cell(cache: Path) -> None:
    content, store = content_of(_tiny().settings[0], 0), Store(cache / "results")
    store.put(content, Method("wb", repair="refit"), "v", {"accuracy": 3.0, "seconds": 2.0})
    again = Store(cache / "results")
    assert again.find(content, Method("wb"), "v") is None
    assert again.find(content, Method("wb", repair="refit"), "v") is not None


def test_version_follows_the_code_and_not_its_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "solver_of_a_test.py"
    monkeypatch.syspath_prepend(str(tmp_path))

    class Plugin:
        @hookimpl
        def mergeot_solvers(self) -> dict[str, object]:
            return {"mine": SimpleNamespace(__module__="solver_of_a_test", measure="weights")}

        @hookimpl
        def mergeot_node_measures(self) -> dict[str, object]:
            return {"weights": SimpleNamespace(__module__="mergeot_measures.measures")}

    def version(text: str) -> str:
        file.write_text(text)
        store_module._hash_of.cache_clear()
        return code_version(Method("mine"), PluginManager([Plugin()]))

    first = version('"""One."""\ndef solve():\n    """Two."""\n    return 1\n')
    assert version('"""Other."""\n# a remark\ndef solve():\n    """Words."""\n    return (1)\n') == first
    assert version('"""One."""\ndef solve():\n    """Two."""\n    return 2\n') != first
    store_module._hash_of.cache_clear()


def test_the_experiment_of_the_guide() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "how-to" / "experiments.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", guide, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(code, names)
    design = names["SHALLOW"].designs[QUICK]()
    assert [method.name for method in design.all_methods] == ["average", "wb, epsilon 0.01"]
    assert [[training.seed for training in one_set] for one_set in design.settings[0].sources][:2] == [[0, 1], [1, 2]]
    assert design.repetitions == 5
    described = {f"`{name}`" for name in EXPERIMENTS if name != "tiny"}
    assert described == set(re.findall(r"^\| (`[a-z-]+`) \|", guide, re.MULTILINE))
