"""Two LSTMs that read digits row by row: what a neuron reads of the others says which one it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mergekit_ot import evaluate, fuse, resolve_data

TRAIN, TEST = resolve_data("digits?split=train&batch=100"), resolve_data("digits?split=test")


class Reader(nn.Module):
    """An LSTM over the eight rows of an image; the last state decides."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits."""
        return self.head(self.lstm(images.flatten(1, 2))[0][:, -1])


def trained(seed: int, epochs: int) -> nn.Module:
    """Returns a network that was trained from its own start."""
    torch.manual_seed(seed)
    model = Reader()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(epochs):
        for images, labels in TRAIN:
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimiser.step()
    return model


def main(epochs: int = 12) -> dict[str, float]:
    """Trains, fuses, and returns the accuracies."""
    sources = [trained(seed, epochs) for seed in (0, 1)]
    models = {"source 0": sources[0], "source 1": sources[1]}
    # wb sees what a neuron reads of the input; gwb also what the neurons read of each other, in all four gates.
    for solver in ("average", "wb", "gwb"):
        models[solver] = fuse(sources, solver=solver, data=TRAIN).model()
    models["gwb, refit"] = fuse(sources, solver="gwb", data=TRAIN, repair="refit").model()
    return {name: evaluate(model, TEST).accuracy or 0.0 for name, model in models.items()}


if __name__ == "__main__":
    for name, accuracy in main().items():
        print(f"{name:16} {accuracy:5.1f} %")
