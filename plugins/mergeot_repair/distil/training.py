"""The training itself: gradient steps on inputs without labels, and held-back inputs that decide when to stop."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mergeot_repair.distil.ensemble import Ensemble, run

# How often held-back inputs are looked at, at least, over the planned run; so many times without a gain end it. At the
# highest rates a network is often farther for a while, and gains when they fall.
_LOOKS, _PATIENCE = 20, 12
# Share of the run in which the learning rate rises.
_WARM_UP = 0.1
_MOST_GRADIENT = 1.0
# A network that is so many times as far as the best one was thrown there: it goes back, with a lower rate.
_THROWN, _LOWER = 1.5, 0.3

# Told (share that is done, mean divergence on held-back inputs, estimate of the seconds left).
Tell = Callable[[float, float, float], None]


@dataclass(frozen=True)
class Schedule:
    """How long is trained, and how fast.

    Attributes:
        epochs: Passes over the inputs.
        minutes: After which the run ends, where it is not over; 0 for none.
        learning_rate: Of Adam, at its highest.
        batch_size: Inputs per step.
        seed: Of the order of the inputs, and of what networks draw.
    """

    epochs: int
    minutes: float
    learning_rate: float
    batch_size: int
    seed: int

    def rate(self, share: float) -> float:
        """Returns the learning rate when a share of the run is done: one cycle, a rise and half a cosine."""
        if share < _WARM_UP:
            return self.learning_rate * max(share, 0.01) / _WARM_UP
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (share - _WARM_UP) / (1 - _WARM_UP)))


def divergence(model: nn.Module, ensemble: Ensemble, numbers: Int[Tensor, " n"]) -> float:
    """Returns how far a network is from the ensemble, in the mean over inputs."""
    total = 0.0
    with torch.no_grad():
        for part in numbers.split(ensemble.size):
            own = [each.double() for each in run(model, ensemble.inputs(part))]
            goals = [each.double() for each in ensemble.goals(part)]
            total += float(ensemble.results.losses(own, goals)) * len(part)
    return total / len(numbers)


def train(
    model: nn.Module,
    ensemble: Ensemble,
    parts: tuple[Int[Tensor, " n"], Int[Tensor, " m"]],
    schedule: Schedule,
    tell: Tell,
) -> Mapping[str, Tensor]:
    """Trains a network towards an ensemble, and returns the state that was nearest to it on held-back inputs.

    Args:
        model: In evaluation mode, so that BatchNorm keeps its statistics; what needs gradients is trained.
        ensemble: Of the sources.
        parts: Numbers of the inputs to train on, and of those that are held back.
        schedule: How long and how fast.
        tell: Told how far it is.
    """
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.Adam(trained, schedule.learning_rate)
    numbers, held = parts
    generator = torch.Generator().manual_seed(schedule.seed)
    # A batch that is not full is left out: the next epoch draws others.
    per_epoch = max(1, len(numbers) // schedule.batch_size)
    planned, started = schedule.epochs * per_epoch, time.monotonic()
    best, nearest, waited, factor = copy.deepcopy(model.state_dict()), divergence(model, ensemble, held), 0, 1.0
    interval = max(1, min(per_epoch, planned // _LOOKS))
    for step in range(planned):
        if step % per_epoch == 0:
            waiting = numbers[torch.randperm(len(numbers), generator=generator)].split(schedule.batch_size)
        passed = (time.monotonic() - started) / 60
        share = max(step / planned, passed / schedule.minutes if schedule.minutes else 0.0)
        if share >= 1:
            break
        optimizer.param_groups[0]["lr"] = factor * schedule.rate(share)
        chosen = waiting[step % per_epoch]
        loss = ensemble.results.losses(run(model, ensemble.inputs(chosen)), ensemble.goals(chosen))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, _MOST_GRADIENT)
        optimizer.step()
        if (step + 1) % interval and step + 1 < planned:
            continue
        found = divergence(model, ensemble, held)
        share = max(share, (step + 1) / planned)
        tell(share, found, (time.monotonic() - started) * (1 / share - 1))
        waited = 0 if found < nearest else waited + 1
        if found < nearest:
            best, nearest = copy.deepcopy(model.state_dict()), found
        if waited > _PATIENCE:
            break
        if not found <= _THROWN * nearest:
            model.load_state_dict(best)
            optimizer.state.clear()
            factor *= _LOWER
    return best
