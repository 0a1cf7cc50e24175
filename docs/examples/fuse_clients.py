"""What a federated server does with networks of different width: one fusion, weighted by numbers of samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mergekit_ot import FusionResult, evaluate, fuse, resolve_data

TRAIN, TEST = list(resolve_data("digits?split=train&batch=100")), resolve_data("digits?split=test")


def net(width: int) -> nn.Module:
    """Returns a client's network; how wide it is, the client chooses by what its device bears."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def loaded(state: Mapping[str, Tensor]) -> nn.Module:
    """Returns the network of a state; its weights tell the width, so that a client need not."""
    model = net(len(state["1.weight"]))
    model.load_state_dict(dict(state))
    return model


def fused_clients(
    states: Sequence[Mapping[str, Tensor]], samples: Sequence[float], width: int, inputs: Iterable[Tensor]
) -> FusionResult:
    """Fuses what clients sent into one network of the server's width; `inputs` are public ones, without labels."""
    clients = [loaded(state) for state in states]
    # Clients never saw each other, so their neurons have to be aligned before anything is averaged.
    return fuse(clients, solver="wb", target=net(width), model_weights=samples, data=inputs, repair="refit")


def trained(number: int, epochs: int) -> tuple[dict[str, Tensor], int]:
    """Trains a client on images of its own, and returns what it sends: a state, and how many samples it saw."""
    batches = TRAIN[3 * number : 3 * number + 3]
    torch.manual_seed(number)
    model = net((24, 32, 48)[number])
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(epochs):
        for images, labels in batches:
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimiser.step()
    return model.state_dict(), sum(len(images) for images, _ in batches)


def main(epochs: int = 30) -> dict[str, float]:
    """Trains three clients, fuses them once, and returns the accuracies."""
    states, samples = zip(*(trained(number, epochs) for number in range(3)), strict=True)
    models = {f"client {number}": loaded(state) for number, state in enumerate(states)}
    models["server"] = fused_clients(states, samples, 48, [images for images, _ in TRAIN[9:]]).model()
    return {name: evaluate(model, TEST).accuracy or 0.0 for name, model in models.items()}


if __name__ == "__main__":
    for name, accuracy in main().items():
        print(f"{name:16} {accuracy:5.1f} %")
