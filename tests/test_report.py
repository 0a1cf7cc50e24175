"""The report of a fusion: what stands on its page, that it stands alone, and that a browser shows it."""

from __future__ import annotations

import base64
import html
import itertools
import json
import re
import shlex
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser, find_chromium
from torch import nn

from mergekit_ot import (
    Permutation,
    Plan,
    evaluate,
    load_checkpoint,
    resolve_architecture,
    resolve_data,
    save_checkpoint,
)
from mergekit_ot.cli.app import main
from mergekit_ot.errors import CheckpointError
from mergekit_ot.fusion import fusion_run
from mergekit_ot.fusion.alignment import FamilyCoupling
from mergekit_ot.jobs import fusing
from mergekit_ot.recipe import FusionRecipe, make_recipe, recipe_keys
from mergekit_ot.report.charts import line_chart
from mergekit_ot.report.markup import escape, tag
from mergekit_ot.report.rasters import coupling_picture, signed_matrix
from mergekit_ot.report.repeating import fuse_command
from mergekit_ot.report.scores import Ensemble
from mergekit_ot.transport.coupling import Coupling

_ARCH = "mlp?sizes=4-6-5-3"
_VOID = {"meta", "link", "img", "br"}
# The texts of charts that reach over the edge of their picture, where a browser cuts them.
_CUT_TEXTS = """[...document.querySelectorAll("svg.chart text")].filter(text => {
    const box = text.getBBox(), room = text.ownerSVGElement.viewBox.baseVal
    return box.x < 0 || box.x + box.width > room.width
}).map(text => text.textContent)"""


class Page(HTMLParser):
    """A page taken apart; every element has to be closed in its turn."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(self.text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    def of(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for element, attributes in self.elements if element == name]

    @property
    def ids(self) -> set[str]:
        return {attributes["id"] or "" for _, attributes in self.elements if "id" in attributes}

    @property
    def shown(self) -> str:
        return " ".join(self.words)

    def rows(self, section: str) -> list[str]:
        """Returns the rows of the table in a section, as text."""
        whole = re.search(rf'<section id="{section}">(.*?)</section>', self.text, re.DOTALL)
        assert whole is not None
        body = re.search(r"<tbody>(.*?)</tbody>", whole[1], re.DOTALL)
        assert body is not None
        rows = re.findall(r"<tr.*?</tr>", body[1], re.DOTALL)
        return [html.unescape(re.sub(r"<[^>]+>", " ", row)) for row in rows]


Fuse = Callable[..., Page]


@pytest.fixture
def fuse(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Fuse:
    """Gives a way to fuse in a folder with networks and data in it; returns the page of the report."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "b", "c")):
        torch.manual_seed(seed)
        _save(f"{name}.pt", "4-6-5-3")
    torch.manual_seed(3)
    _save("wide.pt", "4-9-7-3")
    x, y = torch.randn(60, 4), torch.randint(3, (60,))
    np.savez("data.npz", x_train=x[:40].numpy(), y_train=y[:40].numpy(), x_test=x[40:].numpy(), y_test=y[40:].numpy())

    def fused(*arguments: str, status: int = 0) -> Page:
        with pytest.raises(SystemExit) as stopped:
            main(["fuse", *arguments, "--report", "report"])
        assert (stopped.value.code or 0) == status, capsys.readouterr().err
        return Page(Path("report/report.html"))

    return fused


def _save(name: str, sizes: str) -> None:
    make = resolve_architecture("mlp", None, {"sizes": sizes})
    save_checkpoint(make(), name, architecture="mlp", arguments={"sizes": sizes}, input_shape=(4,))


def _stands_alone(page: Page) -> None:
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert "url(" not in page.text
    assert "@import" not in page.text
    assert not page.of("script")
    for name, attributes in page.elements:
        for key in ("src", "href", "srcset", "xlink:href"):
            value = attributes.get(key) or ""
            assert value.startswith(("data:", "#")) or key not in attributes, (name, value)
    assert {(link["href"] or "")[1:] for link in page.of("a")} <= page.ids


def _is_accessible(page: Page) -> None:
    assert page.of("html")[0]["lang"] == "en"
    assert all(image.get("alt") for image in page.of("img"))
    for picture in page.of("svg"):
        assert picture.get("aria-hidden") == "true" or picture.get("aria-labelledby") in page.ids
    assert len(page.of("table")) == len(page.of("caption"))
    headings = [int(name[1]) for name, _ in page.elements if re.fullmatch("h[1-6]", name)]
    assert headings[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(headings))


def test_page_of_two_networks_with_data(fuse: Fuse) -> None:
    page = fuse("a.pt", "b.pt", "--data", "data.npz", "--model-weights", "0.25,0.75")
    _stands_alone(page)
    _is_accessible(page)
    for name in ("a.pt", "b.pt", "fused.pt"):
        assert load_checkpoint(name).sha256 in page.shown
    report = json.loads(Path("report/report.json").read_text())
    assert len(page.rows("groups")) == len(report["groups"]) == 2
    for group in report["groups"]:
        (row,) = [row for row in page.rows("groups") if group["name"] in row]
        assert f"{group['cost']:.4g}" in row
        assert f" {group['size']} " in row
    assert len(page.of("img")) == 4
    assert len([picture for picture in page.of("svg") if "chart" in (picture.get("class") or "")]) == 3
    assert "0.25" in page.shown
    assert {"sources", "scores", "path", "groups", "couplings", "warnings", "method", "plan", "repeat"} <= page.ids


def test_scores_are_those_of_evaluate(fuse: Fuse) -> None:
    page = fuse("a.pt", "b.pt", "--data", "data.npz", "--model-weights", "0.25,0.75")
    make, data = resolve_architecture(_ARCH), resolve_data("data.npz")
    models, states = [], [load_checkpoint(name).state for name in ("a.pt", "b.pt", "fused.pt")]
    states.append({name: 0.25 * states[0][name] + 0.75 * states[1][name] for name in states[0]})
    for state in states:
        models.append(make())
        models[-1].load_state_dict(state)
    first, second, fused, naive = evaluate(models, data)
    x, y = next(iter(data))
    with torch.no_grad():
        mixed = 0.25 * models[0](x).softmax(1) + 0.75 * models[1](x).softmax(1)
    rows = page.rows("scores")
    for row, score in zip((rows[0], rows[1], rows[3], rows[4]), (first, second, naive, fused), strict=True):
        assert f"{score.accuracy:.2f} %" in row
        assert f"{score.loss:.4g}" in row
    assert f"{0.25 * first.accuracy + 0.75 * second.accuracy:.2f} %" in rows[2]
    assert f"{100 * float((mixed.argmax(1) == y).float().mean()):.2f} %" in rows[5]
    assert f"{float(nn.functional.nll_loss(mixed.log(), y)):.4g}" in rows[5]
    curves = json.loads(Path("report/report.json").read_text())["path"]
    assert [len(curves[name]["t"]) for name in ("naive", "aligned")] == [25, 25]
    # On a path of 25 points t = 0.75 is one of them, and it is the fused model.
    assert curves["aligned"]["loss"][18] == pytest.approx(fused.loss, rel=1e-4)
    assert curves["naive"]["loss"][18] == pytest.approx(naive.loss, rel=1e-4)
    assert f"{fused.accuracy:.2f} %" in page.shown.partition("Sources and fused model")[0]


def test_repeating_the_command_gives_the_same_tensors(fuse: Fuse) -> None:
    Path("it's & mine.npz").write_bytes(Path("data.npz").read_bytes())
    fuse(
        "a.pt",
        "b.pt",
        "-o",
        "one two.pt",
        "--solver",
        "gwb",
        "--solver-option",
        "alpha=0.5",
        "--solver-option",
        "signs=false",
        "--data",
        "it's & mine.npz",
        "--measure",
        "activations",
        "--refine",
        "--restarts",
        "2",
        "--seed",
        "3",
        "--model-weights",
        "0.1,0.9",
        "--target",
        "1",
    )
    before = load_checkpoint("one two.pt").state
    report = json.loads(Path("report/report.json").read_text())
    page = Page(Path("report/report.html"))
    for command in (report["command"], report["recipe_command"]):
        assert command in page.words
        Path("one two.pt").unlink()
        program, *arguments = shlex.split(command)
        assert program == "mergeot"
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert not stopped.value.code
        after = load_checkpoint("one two.pt").state
        assert set(after) == set(before)
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_command_says_all_that_a_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(
        models=["-a.pt", "b c.pt"],
        output="o'.pt",
        solver="gwb",
        solver_options={"alpha": 0.1, "signs": False},
        arch=["x.py:f?a=1&b=2", "y"],
        trust=["b c.pt"],
        input_shape=(1, 2),
        measure="importance",
        model_weights=(1 / 3, 2 / 3),
        target=1,
        data="d.npz",
        inputs=["x=1,8,8", "t=int:1000"],
        input_key="image,mask",
        label_key="kind",
        calibration_size=3,
        calibration_tokens=12,
        repair="reset",
        repair_options={"target": "outputs", "share": 0.5},
        fallback=True,
        refine=True,
        restarts=4,
        widen=1.5,
        untie=True,
        device="cpu",
        seed=5,
        report="r",
        front_end="export",
        trace_seconds=2.5,
        trace_operations=7,
        dtype="bfloat16",
        executor="other",
        threads=3,
        keep=["stem.*", "fc.*=1"],
        head="both",
        overwrite=True,
        format="state-dict",
        state_key="model.params_ema",
        strip_prefix="net.",
        ignore=["total_*", "loss fn.*"],
    )
    defaults = FusionRecipe()
    # Rules for single layers stand in recipes only.
    assert [name for name in recipe_keys() if getattr(recipe, name) == getattr(defaults, name)] == ["layers"]
    seen = []

    def stop(made: FusionRecipe, *_: object, **__: object) -> None:
        seen.append(made)
        raise CheckpointError("enough")

    monkeypatch.setattr(fusing, "run_fuse", stop)
    command = fuse_command(recipe, "cpu")
    with pytest.raises(SystemExit):
        main(shlex.split(command)[1:])
    assert seen == [recipe]


def test_what_no_flag_can_say_is_left_to_the_recipe() -> None:
    recipe = make_recipe(models=["a", "b"], solver_options={"members": "3"})
    assert fuse_command(recipe, "cpu") is None
    recipe = make_recipe(models=["a", "b"], layers=[{"parameters": "*", "keep": 0}])
    assert fuse_command(recipe, "cpu") is None


def test_names_are_escaped(fuse: Fuse) -> None:
    name = 'a<b>&".pt'
    Path(name).write_bytes(Path("a.pt").read_bytes())
    page = fuse(name, "b.pt", "-o", "<i>.pt", "--data", "data.npz")
    assert "<b>" not in page.text
    assert "<i>" not in page.text
    assert page.shown.count(name) >= 3
    _stands_alone(page)


def test_page_without_data(fuse: Fuse) -> None:
    page = fuse("a.pt", "b.pt")
    assert "no data was given. Pass --data SPEC" in page.shown
    assert "path" not in page.ids
    assert page.of("svg") == []
    assert len(page.rows("groups")) == 2
    assert Path.cwd().as_posix() not in page.text
    _stands_alone(page)
    _is_accessible(page)


def test_page_of_unequal_widths(fuse: Fuse) -> None:
    page = fuse("a.pt", "wide.pt", "--data", "data.npz")
    assert "There is no naive average: 'fc1.weight' is 6×4 in source 1 and 9×4 in source 2" in page.shown
    assert "no straight path between networks of unequal widths" in page.shown
    assert any("6 (from 6, 9)" in row and "transport plan" in row for row in page.rows("groups"))
    assert "naive average" not in " ".join(page.rows("scores"))
    widths = {(image["width"], image["height"]) for image in page.of("img")}
    assert ("112", str(112 * 6 // 9)) in widths
    _stands_alone(page)


def test_page_of_three_networks(fuse: Fuse) -> None:
    page = fuse("a.pt", "b.pt", "c.pt", "--data", "data.npz")
    assert "A path joins two sources; 3 were fused." in page.shown
    assert len(page.of("img")) == 6
    assert len(page.rows("scores")) == 7
    assert all(row.count(", ") == 2 for row in page.rows("groups"))


def test_page_of_soft_plans(fuse: Fuse) -> None:
    page = fuse("a.pt", "b.pt", "--solver-option", "epsilon=0.5", "--data", "data.npz")
    assert all("transport plan" in row for row in page.rows("groups"))
    assert "partners each" in page.shown
    assert "not the sources themselves" in page.shown
    assert "epsilon=0.5" in page.shown


def test_page_of_one_network_into_other_sizes(fuse: Fuse) -> None:
    page = fuse("a.pt", "--target", "mlp?sizes=4-12-10-3", "--data", "data.npz")
    assert "One network was fused with wb into other sizes" in page.shown
    assert len(page.rows("scores")) == 2
    assert "A path joins two sources; one was fused." in page.shown


def test_page_of_neurons_kept_apart(fuse: Fuse) -> None:
    page = fuse("a.pt", "b.pt", "--target", "mlp?sizes=4-12-10-3", "--data", "data.npz")
    assert "without partner" in page.shown
    assert any("6, 6" in row for row in page.rows("groups"))


def test_page_where_nothing_moves(fuse: Fuse) -> None:
    page = fuse("a.pt", "b.pt", "--solver", "average", "--data", "data.npz")
    assert page.rows("scores")[2:4]
    _stands_alone(page)


def test_a_report_says_who_coupled_each_group(fuse: Fuse) -> None:
    page = fuse("a.pt", "b.pt", "--refine")
    assert all(" refinement " in row for row in page.rows("groups"))
    assert "coupled by" in page.shown
    assert Path("report/report.md").read_text().count("| refinement |") == 2
    assert all(" nobody " in row for row in fuse("a.pt", "b.pt", "--solver", "average").rows("groups"))


def test_a_report_says_where_the_symmetries_of_its_solver_hold(fuse: Fuse) -> None:
    arguments = {"cell": "rnn", "hidden": 5, "layers": 2, "columns": 3, "classes": 2}
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = resolve_architecture("rows", None, arguments)()
        save_checkpoint(net, f"r{seed}.pt", architecture="rows", arguments=arguments, input_shape=(4, 3))
    page = fuse("r0.pt", "r1.pt", "--solver", "gwb")
    report = json.loads(Path("report/report.json").read_text())
    names = [group["name"] for group in report["groups"]]
    assert set(report["symmetries"]["sign"]) == set(names)
    assert len(names) == 2
    assert all(" sign " in row for row in page.rows("groups"))
    for text in (page.shown, Path("report/report.md").read_text()):
        assert "besides the order of neurons: sign (proven for 2 of 2 groups)." in text
    page = fuse("a.pt", "b.pt", "--solver", "gwb")
    assert "sign (proven for none of 2 groups)." in page.shown
    assert json.loads(Path("report/report.json").read_text())["symmetries"] == {"sign": []}
    page = fuse("a.pt", "b.pt")
    assert "ymmetries" not in page.shown
    assert json.loads(Path("report/report.json").read_text())["symmetries"] == {}


def test_a_report_names_symmetries_that_it_does_not_know(fuse: Fuse, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {("fc1.weight", 0): (1,), ("fc2.weight", 1): (-1,)}
    found = {"scale": {"fc1.weight:0": places}, "turn": {}}
    monkeypatch.setattr(fusion_run, "find_symmetries", lambda setup: found)
    monkeypatch.setattr(fusion_run, "symmetries_for", lambda symmetries, solver: symmetries)
    page = fuse("a.pt", "b.pt")
    assert "scale (proven for 1 of 2 groups), turn (proven for none of 2 groups)." in page.shown
    assert [" scale " in row for row in page.rows("groups")] == [True, False]
    symmetries = json.loads(Path("report/report.json").read_text())["symmetries"]
    assert symmetries == {"scale": ["fc1.weight:0"], "turn": []}


def test_options_without_words_of_their_own_are_shown_where_they_are_unusual(fuse: Fuse) -> None:
    assert "trace operations" not in fuse("a.pt", "b.pt").shown
    page = fuse("a.pt", "b.pt", "--trace-operations", "777")
    assert dict(zip(page.words, page.words[1:], strict=False))["trace operations"] == "777"


def test_page_of_batch_norm_with_a_repair(fuse: Fuse) -> None:
    arguments = {"channels": "4-4", "hidden": 6, "classes": 10, "image": 8, "batch_norm": True}
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = resolve_architecture("cnn", None, arguments)().train()
        for norm in (net.bn1, net.bn2):
            norm.momentum = None
        for inputs, _ in resolve_data("digits?limit=100", split="train"):
            net(inputs)
        save_checkpoint(net, f"n{seed}.pt", architecture="cnn", arguments=arguments, input_shape=(1, 8, 8))
    page = fuse("n0.pt", "n1.pt", "--data", "digits?limit=100", "--repair", "reset", "--calibration-size", "100")
    assert "without the repair 'reset'" in page.shown
    assert "reset" in dict(zip(page.words, page.words[1:], strict=False))["repair"]
    plain = fuse("n0.pt", "n1.pt")
    assert "The network has BatchNorm" in plain.shown.partition("Warnings")[2]


def test_scores_that_fail_are_a_sentence_and_lose_nothing(fuse: Fuse, capsys: pytest.CaptureFixture[str]) -> None:
    content = dict(np.load("data.npz"))
    np.savez("train.npz", x_train=content["x_train"], y_train=content["y_train"])
    page = fuse("a.pt", "b.pt", "--data", "train.npz")
    assert "Nothing was scored: 'train.npz' has no test part" in page.shown
    assert "warning: Nothing was scored" in capsys.readouterr().err
    np.savez("odd.npz", **{**content, "y_test": np.full(20, 7)})
    page = fuse("a.pt", "b.pt", "--data", "odd.npz")
    assert "Target 7 is no class of a model with 3 outputs" in page.shown
    Path("source.py").write_text(
        "import torch\n"
        "def breaks(split):\n"
        "    yield torch.randn(4, 4), torch.zeros(4).long()\n"
        "    if split == 'test':\n        raise ValueError('<broken>')\n"
    )
    page = fuse("a.pt", "b.pt", "--data", "source.py:breaks")
    assert "<broken>" in page.shown
    assert load_checkpoint("fused.pt").state


def test_float_targets_are_scored_by_their_loss(fuse: Fuse) -> None:
    content = dict(np.load("data.npz"))
    content["y_test"] = np.random.default_rng(0).normal(size=(20, 3))
    np.savez("float.npz", **content)
    page = fuse("a.pt", "b.pt", "--data", "float.npz")
    assert "has a loss of" in page.shown
    assert "accuracy" not in " ".join(page.rows("scores"))
    assert len([picture for picture in page.of("svg") if "chart" in (picture.get("class") or "")]) == 2


def test_a_report_that_cannot_be_written_loses_nothing(
    fuse: Fuse, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = fuse("a.pt", "b.pt").text

    def fails(*_: object, **__: object) -> None:
        raise CheckpointError("Cannot write 'report/report.html': no space left on device.")

    monkeypatch.setattr("mergekit_ot.report.writing.write_texts", fails)
    capsys.readouterr()
    assert fuse("a.pt", "b.pt", "-o", "again.pt", status=1).text == page
    assert "'again.pt' was written, but its report was not. Cannot write" in capsys.readouterr().err
    assert load_checkpoint("again.pt").state
    assert [path.name for path in Path("report").iterdir() if "part" in path.name] == []


def test_pictures_of_couplings() -> None:
    flipped = Permutation(torch.tensor([2, 0, 1]), sign=torch.tensor([1.0, -1.0, 1.0]))
    assert signed_matrix(flipped).tolist() == [[0, 0, 1], [-1, 0, 0], [0, 1, 0]]
    assert _pixels(flipped, 96) == [[0, 0, 15], [30, 0, 0], [0, 15, 0]]
    family = FamilyCoupling({((0, 1),): Permutation.identity(2), ((1, 0),): Permutation(torch.tensor([1, 0]))})
    assert signed_matrix(family).tolist() == [[0, 0, 1, 0], [0, 0, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0]]
    assert len(_pixels(Permutation.identity(1000), 96)) == 91
    assert _pixels(Permutation.identity(4), 2) == [[15, 0], [0, 15]]
    both = Permutation(torch.arange(4), sign=torch.tensor([1.0, -1.0, -1.0, -1.0]))
    assert _pixels(both, 2) == [[15, 0], [0, 30]]
    wide = Plan(torch.tensor([[0.25, 0.25, 0.0, 0.0], [0.0, 0.0, 0.25, 0.25]]))
    assert _pixels(wide, 96) == [[15, 15, 0, 0], [0, 0, 15, 15]]


def _pixels(coupling: Coupling, cells: int) -> list[list[int]]:
    """Reads a picture back: one filter byte and one byte per pixel in each row."""
    address, width, height = coupling_picture(coupling, cells)
    png = base64.b64decode(address.partition(",")[2])
    start = png.index(b"IDAT")
    packed = png[start + 4 : start + 4 + int.from_bytes(png[start - 4 : start], "big")]
    rows = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, width + 1)
    return rows[:, 1:].tolist()


def test_pictures_stop_before_the_page_is_too_large_to_send(fuse: Fuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_ot.report.groups_section._ROOM", 1200)
    page = fuse("a.pt", "b.pt")
    assert "1 more group is not drawn, to keep the page small." in page.shown
    assert len(page.of("img")) == 2
    assert len(page.rows("groups")) == 2


def test_charts_take_numbers_that_are_not_finite() -> None:
    curve = {"t": [0.0, 0.5, 1.0], "loss": [0.1, float("inf"), 1e6], "accuracy": [100.0, 100.0, 100.0]}
    curves = {"naive": curve, "aligned": curve}
    drawn = line_chart(curves, "loss", (0.5, float("nan")), "loss", "1")
    assert "inf" not in drawn
    assert "nan" not in drawn
    assert "logarithmic" in drawn
    assert "100" in line_chart(curves, "accuracy", (0.5, 100.0), "accuracy", "2")


def test_markup_escapes_what_is_not_markup() -> None:
    assert tag("p", "<&>", tag("b", "x"), None, class_="a'b", hidden=True, id=None) == (
        '<p class="a&#x27;b" hidden>&lt;&amp;&gt;<b>x</b></p>'
    )
    assert escape("net\udcff.pt") == "net\ufffd.pt"


def test_ensemble_takes_the_mean_of_probabilities_on_the_axis_of_the_classes() -> None:
    x = torch.randn(2, 3, 5)
    halves = Ensemble([nn.Identity(), nn.Flatten(0, 0), nn.Identity()], (0.5, 0.5, 0.0), 1)
    assert torch.allclose(halves(x).exp(), x.softmax(1), atol=1e-6)
    assert torch.allclose(Ensemble([nn.Identity()], (1.0,), None)(x), x)


@pytest.mark.skipif(find_chromium() is None, reason="there is no Chromium on this machine")
def test_a_browser_shows_the_page(fuse: Fuse, tmp_path: Path) -> None:
    long = "a_rather_long_name_of_a_checkpoint_from_a_sweep_over_seeds_and_rates_lr0.001_seed17_epoch0042.pt"
    Path(long).write_bytes(Path("a.pt").read_bytes())
    page = tmp_path / "report" / "report.html"
    with Browser(find_chromium() or "") as browser:
        for arguments in ((long, "b.pt", "--data", "data.npz"), ("a.pt", "wide.pt"), ("a.pt", "b.pt", "c.pt")):
            fuse(*arguments)
            for width, is_dark, media in ((1200, False, ""), (360, False, ""), (360, True, ""), (794, False, "print")):
                browser.open(page, width, is_dark=is_dark, media=media)
                assert browser.value("document.documentElement.scrollWidth <= window.innerWidth"), (arguments, width)
                assert browser.messages == []
                assert [address for address in browser.requests if not address.startswith(("data:", "file:"))] == []
                assert browser.value("[...document.images].every(image => image.naturalWidth > 0)")
                assert browser.value(_CUT_TEXTS) == [], (arguments, width)
                assert browser.value("document.querySelectorAll('section').length") >= 6
                ground = browser.value("getComputedStyle(document.body).backgroundColor")
                assert ground == ("rgb(20, 23, 27)" if is_dark else "rgb(255, 255, 255)")
                picture = browser.screenshot(tmp_path / f"page-{width}{'-dark' if is_dark else ''}.png")
                assert picture.stat().st_size > 10_000
