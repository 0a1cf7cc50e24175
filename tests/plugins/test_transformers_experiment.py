"""The experiment with transformers: its data, and every family through training, fusion and the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mergeot_experiments.catalogue.descriptions import DIGITS, FULL, QUICK, Design, Experiment, Method
from mergeot_experiments.catalogue.registry import EXPERIMENTS
from mergeot_experiments.catalogue.transformers import DEEP_TRANSFORMERS, TRANSFORMERS
from mergeot_experiments.sources.sequences import SEQUENCE_SETS, data_set, rows_of
from mergeot_experiments.sources.training import trained

from mergekit_ot import DataError, evaluate, fuse, resolve_architecture
from mergekit_ot.cli.app import main

_LEVEL_SETS = [name for name in SEQUENCE_SETS if name.startswith("levels") or name == "digits-in-a-row"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEOT_CACHE", str(tmp_path))
    monkeypatch.delenv("MERGEOT_DATA", raising=False)
    pytest.importorskip("transformers")


def _small() -> Design:
    """The design on digits, each network trained for an epoch."""
    design = TRANSFORMERS.designs[DIGITS]()
    settings = []
    for setting in design.settings:
        shorter = [tuple(replace(each, epochs=1, batch=128) for each in setting.sources[0])]
        settings.append(replace(setting, sources=tuple(shorter)))
    return Design(tuple(settings), (Method("weight-matching"),))


@pytest.mark.parametrize("name", _LEVEL_SETS)
def test_tests_hold_nothing_that_was_trained_on(name: str) -> None:
    sequences = data_set(name)
    inputs, targets = sequences.training_images()
    parts = inputs if isinstance(inputs, tuple) else (inputs,)
    assert all(len(part) == len(targets) for part in parts)
    assert torch.equal(sequences.training_images()[1], targets)
    tests = [batch[0] if isinstance(batch, tuple) else batch for batch, _ in sequences.test_batches()]
    known = {row.numpy().tobytes() for row in parts[0]}
    assert not known & {row.numpy().tobytes() for row in torch.cat(tests)}


def test_what_is_written_is_what_was_read_one_step_later() -> None:
    (_, written), targets = data_set("levels-halves").training_images()
    assert torch.equal(written[:, 1:], targets[:, :-1])
    inputs, targets = data_set("levels-next").training_images()
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    inputs, targets = data_set("levels-hidden").training_images()
    assert 0.25 < float((inputs != targets).float().mean()) < 0.35


def test_characters_need_a_folder() -> None:
    with pytest.raises(DataError, match="MERGEOT_DATA names none"):
        data_set("characters-next").training_images()


def test_characters_are_read_from_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEOT_DATA", str(tmp_path / "data"))
    with pytest.raises(DataError, match="cannot read"):
        data_set("characters-next").training_images()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tinyshakespeare.txt").write_text("abcdefgh" * 1000, encoding="utf-8")
    inputs, targets = data_set("characters-next").training_images()
    assert torch.equal((inputs + 1) % 8, targets)


@pytest.mark.parametrize(("scale", "width", "layers"), [(QUICK, 128, 4), (FULL, 256, 6)])
def test_deep_networks_have_the_sizes_that_are_named(scale: str, width: int, layers: int) -> None:
    gpt2, vit = (setting.sources[0] for setting in DEEP_TRANSFORMERS.designs[scale]().settings)
    assert [training.seed for training in (*gpt2, *vit)] == [1, 2, 1, 2]
    for (training, _), inputs, outputs in (
        (gpt2, torch.zeros(2, 64, dtype=torch.long), (2, 64, 65)),
        (vit, torch.zeros(2, 3, 32, 32), (2, 10)),
    ):
        net = resolve_architecture(training.architecture, arguments=training.arguments)()
        norms = [module for module in net.modules() if isinstance(module, torch.nn.LayerNorm)]
        # Two in front of the maps of each layer, one at the end.
        assert len(norms) == 2 * layers + 1
        assert {norm.normalized_shape for norm in norms} == {(width,)}
        assert tuple(net(inputs).shape) == outputs


@pytest.mark.parametrize("experiment", [TRANSFORMERS, DEEP_TRANSFORMERS], ids=lambda each: each.name)
def test_what_orders_alone_make_is_measured_beside(experiment: Experiment) -> None:
    for make in experiment.designs.values():
        methods = make().methods
        for solver in ("weight-matching", "activation-matching"):
            assert Method(solver) in methods
            assert Method(solver, {"symmetry": "permutation"}) in methods


@pytest.mark.slow
@pytest.mark.parametrize("family", ["GPT-2", "ViT"])
def test_deep_networks_are_trained_and_refitted(family: str) -> None:
    (setting,) = [setting for setting in DEEP_TRANSFORMERS.designs[DIGITS]().settings if setting.row == family]
    sequences = data_set(setting.sources[0][0].data)
    shorter = [replace(training, epochs=1, batch=128) for training in setting.sources[0]]
    models = [trained(training, sequences.training_images, lambda _: None) for training in shorter]
    test = [(rows_of(inputs, slice(100)), targets[:100]) for inputs, targets in sequences.test_batches()[:1]]
    calibration = [(rows_of(inputs, slice(200)), targets[:200]) for inputs, targets in sequences.calibration_batches()]
    fused = fuse(models, solver="average", data=calibration[:1], repair="refit", device="cpu")
    score = evaluate(fused.model(), test)
    assert score.loss < 1.3 * max(each.loss for each in evaluate(models, test))


@pytest.mark.slow
@pytest.mark.parametrize("family", [setting.row for setting in TRANSFORMERS.designs[DIGITS]().settings])
def test_every_family_is_trained_and_fused(family: str) -> None:
    (setting,) = [setting for setting in _small().settings if setting.row == family]
    sequences = data_set(setting.sources[0][0].data)
    inputs, targets = sequences.training_images()

    def some() -> tuple[object, torch.Tensor]:
        return rows_of(inputs, slice(512)), targets[:512]

    models = [trained(training, some, lambda _: None) for training in setting.sources[0]]
    test = sequences.test_batches()[:1]
    result = fuse(models, solver="weight-matching", example_inputs=rows_of(test[0][0], slice(2)), device="cpu")
    assert result.aligned_sources_max_error is not None
    assert result.aligned_sources_max_error < 1e-5
    assert len(result.groups) >= 9
    score = evaluate(result.model(), test)
    assert score.is_of_tokens == (family != "ViT")
    assert score.loss < 2 * max(each.loss for each in evaluate(models, test))


@pytest.mark.slow
def test_the_table_shows_losses_and_groups(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def vit() -> Design:
        design = _small()
        return Design(tuple(each for each in design.settings if each.row == "ViT"), design.methods)

    monkeypatch.setitem(EXPERIMENTS, "transformers", replace(TRANSFORMERS, designs={QUICK: vit, DIGITS: vit}))
    with pytest.raises(SystemExit):
        main(["experiments", "run", "transformers", "--json"])
    printed = capsys.readouterr()
    (table,) = json.loads(printed.out)["experiments"]
    mean, ensemble, fused = table["rows"]
    assert mean["name"] == "sources, mean"
    assert mean["loss"]["loss"]["mean"] == pytest.approx(float(ensemble["loss"]["loss"]["mean"]), rel=0.2)
    assert fused["groups"] == 9
    assert fused["loss"]["loss"]["mean"] > 0
    shown = " ".join(printed.err.split())
    assert "Transformers of six families (scikit-learn's digits): loss, 1 set of sources" in shown
    assert "sources network loss groups s" in shown
    with pytest.raises(SystemExit):
        main(["experiments", "table", "transformers"])
    assert "losses on test data, lower is better" in capsys.readouterr().out
