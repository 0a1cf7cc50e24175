"""Three networks, each taught on a third of the data, fused with a weight for each."""

from __future__ import annotations

import torch
from torch import nn

from mergekit_ot import evaluate, fuse, resolve_data

TRAIN, TEST = list(resolve_data("digits?split=train&batch=100")), resolve_data("digits?split=test")


def net() -> nn.Module:
    """Returns a network with one hidden layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))


def trained(number: int, batches: int, epochs: int) -> nn.Module:
    """Returns a network that saw so many batches from a place of its own."""
    torch.manual_seed(number)
    model = net()
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        for images, labels in TRAIN[4 * number : 4 * number + batches]:
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimiser.step()
    return model


def main(epochs: int = 30) -> dict[str, float]:
    """Trains, fuses, and returns the accuracies."""
    counts = [4, 4, 1]
    sources = [trained(number, count, epochs) for number, count in enumerate(counts)]
    models = {f"source {number}": source for number, source in enumerate(sources)}
    # Every source is aligned to the first one and to the others in turn. Weights are divided by their sum, so numbers
    # of samples can be given as they are: the third network saw a quarter as much, and counts as much less.
    for name, weights in {"equal weights": None, "by samples": counts}.items():
        options = {"model_weights": weights, "data": TRAIN, "repair": "refit"}
        models[name] = fuse(sources, solver="weight-matching", **options).model()
    return {name: evaluate(model, TEST).accuracy or 0.0 for name, model in models.items()}


if __name__ == "__main__":
    for name, accuracy in main().items():
        print(f"{name:16} {accuracy:5.1f} %")
