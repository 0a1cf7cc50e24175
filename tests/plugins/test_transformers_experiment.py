"""The experiment with transformers: its data, and every family through training, fusion and the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mergeot_experiments.catalogue.descriptions import DIGITS, QUICK, Design, Method
from mergeot_experiments.catalogue.registry import EXPERIMENTS
from mergeot_experiments.catalogue.transformers import TRANSFORMERS
from mergeot_experiments.sources.sequences import SEQUENCE_SETS, data_set, rows_of
from mergeot_experiments.sources.training import trained

from mergekit_ot import DataError, evaluate, fuse
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
