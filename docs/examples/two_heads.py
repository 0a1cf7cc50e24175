"""Two networks that were taught different digits: one 0 to 4, the other 5 to 9. Run it, and it writes a.pt and b.pt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mergekit_ot import resolve_data


def net(classes: int = 5, width: int = 64) -> nn.Module:
    """Returns a network with two hidden layers; the last layer is its head."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def digits(split: str, first: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Returns the digits from `first` to `first` + 4 of the training or the test part, numbered from 0."""
    batches = resolve_data(f"digits?split={split}")
    chosen = [(images, labels, (labels >= first) & (labels < first + 5)) for images, labels in batches]
    return [(images[mine], labels[mine] - first) for images, labels, mine in chosen]


def trained(first: int, seed: int) -> nn.Module:
    """Returns a network that was taught five digits."""
    torch.manual_seed(seed)
    network, batches = net(), digits("train", first)
    optimiser = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(60):
        for images, labels in batches:
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimiser.step()
    return network


if __name__ == "__main__":
    for name, first, seed in (("a.pt", 0, 0), ("b.pt", 5, 1)):
        torch.save(trained(first, seed).state_dict(), name)
