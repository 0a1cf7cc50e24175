"""A network of your own: what can be reordered in it, whether that is true, fused, and kept as a file."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from mergekit_ot import check_model, evaluate, fuse, resolve_data, save_checkpoint, trace_model

TRAIN, TEST = resolve_data("digits?split=train&batch=100"), resolve_data("digits?split=test")


class Gated(nn.Module):
    """A stream that a gated branch is added to; nothing in it is known by name."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(64, 32), nn.Linear(32, 10)
        self.gate, self.value, self.back = nn.Linear(32, 40), nn.Linear(32, 40), nn.Linear(40, 32)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits."""
        stream = torch.relu(self.enter(images.flatten(1)))
        return self.leave(stream + self.back(torch.sigmoid(self.gate(stream)) * self.value(stream)))


def trained(seed: int, epochs: int) -> nn.Module:
    """Returns a network that was trained from its own start."""
    torch.manual_seed(seed)
    model = Gated()
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        for images, labels in TRAIN:
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimiser.step()
    return model


def main(epochs: int = 12) -> dict[str, float]:
    """Traces, checks, trains, fuses, and returns the accuracies."""
    # The graph says which axes share one order of neurons: here the stream, and the branch, whose gate goes with it.
    groups = trace_model(Gated(), torch.zeros(2, 1, 8, 8)).free_groups
    # Not believed but tried: with every group in a random order, the network must compute what it did.
    report = check_model(Gated, torch.zeros(2, 1, 8, 8))
    sources = [trained(seed, epochs) for seed in (0, 1)]
    fused = fuse(sources, solver="wb", data=TRAIN, repair="refit").model()
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(fused, Path(folder) / "fused.pt")
    models = {"source 0": sources[0], "source 1": sources[1], "fused": fused}
    facts = {"groups": float(len(groups)), "preserved": float(bool(report.preserved))}
    return facts | {name: evaluate(model, TEST).accuracy or 0.0 for name, model in models.items()}


if __name__ == "__main__":
    for name, number in main().items():
        print(f"{name:16} {number:5.1f}")
