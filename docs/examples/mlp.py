"""Two perceptrons from different seeds: the plain average forgets, the fused network does not."""

from __future__ import annotations

import torch
from torch import nn

from mergekit_ot import evaluate, fuse, resolve_data

TRAIN, TEST = resolve_data("digits?split=train&batch=100"), resolve_data("digits?split=test")


def net() -> nn.Module:
    """Returns a network with two hidden layers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))


def trained(seed: int, epochs: int) -> nn.Module:
    """Returns a network that was trained from its own start."""
    torch.manual_seed(seed)
    model = net()
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        for images, labels in TRAIN:
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimiser.step()
    return model


def main(epochs: int = 15) -> dict[str, float]:
    """Trains, fuses, and returns the accuracies."""
    sources = [trained(seed, epochs) for seed in (0, 1)]
    models = {"source 0": sources[0], "source 1": sources[1]}
    # Neuron 7 of one network has nothing to do with neuron 7 of the other, so their mean is neither.
    models["average"] = fuse(sources, solver="average", data=TRAIN).model()
    # Without data: neurons are put in one order by their weights, then averaged.
    models["weight-matching"] = fuse(sources, solver="weight-matching", data=TRAIN).model()
    # With inputs (labels are never read): neurons that respond alike, and layers fitted to both sources.
    models["with refit"] = fuse(sources, solver="activation-matching", data=TRAIN, repair="refit").model()
    return {name: evaluate(model, TEST).accuracy or 0.0 for name, model in models.items()}


if __name__ == "__main__":
    for name, accuracy in main().items():
        print(f"{name:16} {accuracy:5.1f} %")
