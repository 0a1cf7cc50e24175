"""The digits, and two networks trained on them from different seeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Digits = dict[str, np.ndarray]

_TEST_SIZE = 500
_EPOCHS = 30
_BATCH = 64
_LEARNING_RATE = 3e-3
# A little weight decay makes neurons of two trainings resemble each other more; the naive average stays broken.
_WEIGHT_DECAY = 1e-3


def load_digits() -> Digits:
    """Returns scikit-learn's 1,797 digits of 8 × 8, scaled to [0, 1], with 500 of them set apart for testing."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    pixels, labels = load(return_X_y=True)
    scaled = (pixels / 16).astype(np.float32)
    x_train, x_test, y_train, y_test = train_test_split(
        scaled, labels, test_size=_TEST_SIZE, random_state=0, stratify=labels
    )
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def write_digits(digits: Digits, path: Path) -> None:
    """Writes the digits as an archive that ``--data`` takes."""
    np.savez(path, **digits)  # type: ignore[arg-type]


def train(
    make: Callable[[], nn.Module], inputs: Float[Tensor, "n d"], targets: Int[Tensor, " n"], seed: int
) -> nn.Module:
    """Trains a fresh network; the seed decides its first weights and the order of the data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().train()
        optimizer = torch.optim.Adam(model.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        steps = _EPOCHS * -(-len(inputs) // _BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
        for _ in range(_EPOCHS):
            for rows in torch.randperm(len(inputs)).split(_BATCH):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
                optimizer.step()
                schedule.step()
    return model.eval()
