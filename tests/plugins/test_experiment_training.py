"""Trainings of deep networks: what names them, how images are moved, where they come from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mergeot_experiments.sources import training as trainings
from mergeot_experiments.sources.mosaics import read_mosaics
from mergeot_experiments.sources.training import Training, augmented

from mergekit_ot import DataError, RecipeError, resolve_architecture

TINY = Training("mlp", {"sizes": "4-3-2"}, "digits", 0, 2)


def test_a_training_that_says_nothing_new_keeps_its_name() -> None:
    old = {k: v for k, v in asdict(TINY).items() if k not in ("schedule", "augment", "precision", "start")}
    text = json.dumps({"version": 1, **old}, sort_keys=True)
    assert TINY.key == f"mlp-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    others = [{"schedule": "cosine"}, {"augment": 2}, {"precision": "bfloat16"}, {"start": "he"}]
    assert len({TINY.key, *(replace(TINY, **change).key for change in others)}) == 5  # type: ignore[arg-type]


def test_unknown_schedules_are_refused() -> None:
    with pytest.raises(RecipeError, match="schedule"):
        replace(TINY, schedule="cosin")


def test_images_are_moved_and_mirrored_and_nothing_else() -> None:
    torch.manual_seed(0)
    image = torch.arange(25.0).reshape(1, 1, 5, 5) + 1
    for _ in range(20):
        moved = augmented(image, 1)[0, 0]
        padded = torch.nn.functional.pad(image[0, 0], (1, 1, 1, 1))
        places = [(flip, row, column) for flip in (False, True) for row in range(3) for column in range(3)]
        windows = [
            (padded.flip(1) if flip else padded)[row : row + 5, column : column + 5] for flip, row, column in places
        ]
        assert any(torch.equal(moved, window) for window in windows)
    assert torch.equal(augmented(torch.ones(40, 1, 4, 4), 0), torch.ones(40, 1, 4, 4))


def test_a_cosine_ends_at_nothing_and_he_keeps_what_starts_at_nothing() -> None:
    model = resolve_architecture("resnet18", arguments={"width": 2})()
    trainings._start_as_he(model)
    assert not bool(model.layer1[0].conv2.weight.any())
    assert abs(float(model.layer4[0].conv1.weight.detach().std()) * (9 * 8 / 2) ** 0.5 - 1) < 0.2
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = trainings._schedule(replace(TINY, schedule="cosine", epochs=4), optimizer, 10)
    rates = []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) > 0.8
    assert rates[-1] < 0.01


def test_mosaics_are_read_tile_by_tile(tmp_path: Path) -> None:
    picture = pytest.importorskip("PIL.Image")
    images = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
    for number, part in enumerate((images[:4], images[4:]), start=1):
        rows = len(part) // 2
        mosaic = part.reshape(rows, 2, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(rows * 32, 64, 3)
        picture.fromarray(mosaic).save(tmp_path / f"train_{number}.webp", lossless=True)
    np.savez(tmp_path / "labels.npz", y_train=np.arange(6, dtype=np.uint8), y_test=np.arange(1, dtype=np.uint8))
    found, labels = read_mosaics(tmp_path, "train")
    assert np.array_equal(found, images)
    assert labels.tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(DataError, match="1 labels and 0 images"):
        read_mosaics(tmp_path, "test")
    with pytest.raises(DataError, match="Cannot read"):
        read_mosaics(tmp_path / "missing", "test")
