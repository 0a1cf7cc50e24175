"""A narrow and a wide perceptron become one network, as narrow, as wide, or of a third size."""

from __future__ import annotations

import torch
from torch import nn

from mergekit_ot import evaluate, fuse, resolve_data

TRAIN, TEST = resolve_data("digits?split=train&batch=100"), resolve_data("digits?split=test")


def net(width: int) -> nn.Module:
    """Returns a network with one hidden layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def trained(width: int, seed: int, epochs: int) -> nn.Module:
    """Returns a network that was trained from its own start."""
    torch.manual_seed(seed)
    model = net(width)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        for images, labels in TRAIN:
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimiser.step()
    return model


def main(epochs: int = 15) -> dict[str, float]:
    """Trains, fuses, and returns the accuracies."""
    sources = [trained(24, 0, epochs), trained(64, 1, epochs)]
    models = {"24 neurons": sources[0], "64 neurons": sources[1]}
    # wb shares out the neurons of layers of different width, so that no source need have the size of the result.
    # The target is a source's number, or a module whose sizes count; its weights are not looked at.
    for name, target in {"fused, 24": 0, "fused, 64": 1, "fused, 40": net(40)}.items():
        models[name] = fuse(sources, solver="wb", target=target, data=TRAIN, repair="refit").model()
    return {name: evaluate(model, TEST).accuracy or 0.0 for name, model in models.items()}


if __name__ == "__main__":
    for name, accuracy in main().items():
        print(f"{name:16} {accuracy:5.1f} %")
