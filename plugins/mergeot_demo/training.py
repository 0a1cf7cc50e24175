"""A short training, whose seed decides the network's first weights and the order of its data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

_EPOCHS = 30
_BATCH = 64
_LEARNING_RATE = 3e-3
# A little weight decay makes neurons of two trainings resemble each other more; the naive average stays broken.
_WEIGHT_DECAY = 1e-3


def train(
    make: Callable[[], nn.Module], inputs: Float[Tensor, "n 1 8 8"], targets: Int[Tensor, " n"], seed: int
) -> nn.Module:
    """Returns a fresh network after a few seconds of training, in evaluation mode.

    Args:
        make: Builds the network.
        inputs: Images of digits.
        targets: The digit in each.
        seed: Two seeds give two networks with their neurons in different order.
    """
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
