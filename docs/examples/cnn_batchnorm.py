"""Two convolutional networks with BatchNorm: averaged statistics are wrong, and have to be estimated anew."""

from __future__ import annotations

import torch
from torch import nn

from mergekit_ot import evaluate, fuse, resolve_data

TRAIN, TEST = resolve_data("digits?split=train&batch=100"), resolve_data("digits?split=test")


def net() -> nn.Module:
    """Returns a network with two convolutions, each normalised."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 24, 3, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(96, 10),
    )


def trained(seed: int, epochs: int) -> nn.Module:
    """Returns a network that was trained from its own start."""
    torch.manual_seed(seed)
    model = net().train()
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(epochs):
        for images, labels in TRAIN:
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimiser.step()
    return model.eval()


def main(epochs: int = 6) -> dict[str, float]:
    """Trains, fuses, and returns the accuracies."""
    sources = [trained(seed, epochs) for seed in (0, 1)]
    models = {"source 0": sources[0], "source 1": sources[1]}
    # The running mean and variance of each channel follow its neuron, but those of a mean of neurons are others.
    for repair in ("none", "reset", "refit"):
        # reset runs the fused network on inputs and takes its statistics; refit fits the layers as well.
        models[f"repair {repair}"] = fuse(sources, solver="activation-matching", data=TRAIN, repair=repair).model()
    return {name: evaluate(model, TEST).accuracy or 0.0 for name, model in models.items()}


if __name__ == "__main__":
    for name, accuracy in main().items():
        print(f"{name:16} {accuracy:5.1f} %")
