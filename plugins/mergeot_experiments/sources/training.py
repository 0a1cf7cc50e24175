"""Trained networks of the experiments: described as data, trained once, kept in a cache.

The cache is a folder of plain checkpoints (``MERGEOT_CACHE``, or ``mergeot`` in the user's cache folder); the name
of a file is a hash of everything that decides its contents, so a changed setting trains anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergekit_ot import Notify, RecipeError, load_checkpoint, resolve_architecture, save_checkpoint
from mergekit_ot.errors import unknown_name
from mergeot_experiments.sources.sequences import Inputs, Samples, rows_of

# Raised whenever the same description would no longer give the same network.
_VERSION = 1
_OPTIMIZERS = ("sgd", "adam")
_SCHEDULES = ("steps", "cosine")
# Later than the first cached networks: at these values, a description means what it meant without them.
_LATER = {"schedule": "steps", "augment": 0, "precision": "float32", "start": "default"}
# Rows that are moved together when images are augmented.
_MOVED_AT_ONCE = 16


@dataclass(frozen=True)
class Training:
    """Everything that decides a trained network.

    Attributes:
        architecture: A registered architecture.
        arguments: Its keyword arguments.
        data: Name of the training data, for the hash: the part of the set it holds is in it.
        seed: Of the first weights and of the order of the data.
        epochs: Passes over the data.
        optimizer: ``sgd`` or ``adam``.
        rate: Learning rate.
        momentum: Of ``sgd``.
        decay: Weight decay.
        batch: Samples per step.
        milestones: The rate is divided by ten after each of these fractions of the training.
        schedule: ``steps`` (the milestones) or ``cosine`` (down to zero, after a first epoch of rising rates).
        augment: Images are moved by up to so many pixels and mirrored at random.
        precision: ``float32``, or ``bfloat16`` for the products.
        start: First weights: the modules' ``default``, or ``he`` (arXiv:1502.01852), which keeps the scale of values
            through many layers without normalisation.
    """

    architecture: str
    arguments: Mapping[str, object]
    data: str
    seed: int
    epochs: int
    optimizer: str = "sgd"
    rate: float = 0.05
    momentum: float = 0.0
    decay: float = 0.0
    batch: int = 64
    milestones: tuple[float, ...] = field(default=())
    schedule: str = "steps"
    augment: int = 0
    precision: str = "float32"
    start: str = "default"

    def __post_init__(self) -> None:
        if self.optimizer not in _OPTIMIZERS:
            raise RecipeError(unknown_name("optimizer", self.optimizer, _OPTIMIZERS))
        if self.schedule not in _SCHEDULES:
            raise RecipeError(unknown_name("schedule", self.schedule, _SCHEDULES))

    @property
    def key(self) -> str:
        """A name that no other training has."""
        said = {name: value for name, value in asdict(self).items() if _LATER.get(name, ...) != value}
        text = json.dumps({"version": _VERSION, **said}, sort_keys=True)
        return f"{self.architecture}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def path(self) -> Path:
        """Where the trained network is kept."""
        return cache_folder() / "trained" / f"{self.key}.safetensors"

    @property
    def description(self) -> str:
        """All of it but the seed, for a reader."""
        arguments = ", ".join(f"{key} {value}" for key, value in self.arguments.items())
        rule = f"{self.optimizer} at {self.rate:g}" + "".join(
            f", {name} {value:g}"
            for name, value in (("momentum", self.momentum), ("weight decay", self.decay))
            if value
        )
        falls = " and ".join(f"{part:g}" for part in self.milestones)
        more = ", the rate falling as a cosine" if self.schedule == "cosine" else ""
        more += f", images mirrored and moved by up to {self.augment} pixels" if self.augment else ""
        return (
            f"`{self.architecture}` ({arguments}) on `{self.data}`: {self.epochs} epochs, {rule}, "
            f"batches of {self.batch}" + (f", the rate divided by ten after {falls} of them" if falls else "") + more
        )


def cache_folder() -> Path:
    """Returns where trained networks are kept."""
    chosen = os.environ.get("MERGEOT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mergeot"


def trained(training: Training, images: Callable[[], Samples], notify: Notify) -> nn.Module:
    """Returns the network in evaluation mode, from the cache or trained now.

    Args:
        training: What to train.
        images: Gives the training inputs and targets; called only where a training is needed.
        notify: Told what happens.
    """
    make = resolve_architecture(training.architecture, arguments=training.arguments)
    path = training.path
    if path.is_file():
        model = make()
        model.load_state_dict(dict(load_checkpoint(path).state))
        return model.eval()
    inputs, targets = images()
    model = _train(make, training, inputs, targets, notify)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(
        model.state_dict(),
        path,
        architecture=training.architecture,
        arguments=dict(training.arguments),
        input_shape=tuple((inputs[0] if isinstance(inputs, tuple) else inputs).shape[1:]),
        provenance={"training": asdict(training)},
    )
    return model


def _train(
    make: Callable[[], nn.Module], training: Training, inputs: Inputs, targets: Tensor, notify: Notify
) -> nn.Module:
    started = time.monotonic()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model = make().train()
        if training.start == "he":
            _start_as_he(model)
        optimizer = _optimizer(training, model)
        schedule = _schedule(training, optimizer, len(targets) // training.batch)
        for epoch in range(training.epochs):
            for rows in _batches(len(targets), training.batch):
                chosen = rows_of(inputs, rows)
                if isinstance(chosen, Tensor):
                    chosen = (augmented(chosen, training.augment) if training.augment else chosen,)
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=training.precision == "bfloat16"):
                    outputs = model(*chosen)
                # Of a sequence, every place counts as a sample.
                outputs = outputs.float().reshape(-1, outputs.shape[-1])
                nn.functional.cross_entropy(outputs, targets[rows].reshape(-1)).backward()
                optimizer.step()
                schedule.step()
            seconds = time.monotonic() - started
            left = seconds / (epoch + 1) * (training.epochs - epoch - 1)
            notify(
                f"training {training.key}, seed {training.seed}: epoch {epoch + 1} of {training.epochs}, "
                f"{seconds:.0f} s, {left:.0f} s left"
            )
    return model.eval()


def _start_as_he(model: nn.Module) -> None:
    for module in model.modules():
        # What an architecture starts at zero (the end of a residual branch) stays there.
        if isinstance(module, nn.Linear | nn.Conv2d) and bool(module.weight.any()):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _optimizer(training: Training, model: nn.Module) -> torch.optim.Optimizer:
    if training.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=training.rate, weight_decay=training.decay)
    return torch.optim.SGD(
        model.parameters(), lr=training.rate, momentum=training.momentum, weight_decay=training.decay
    )


def _schedule(training: Training, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Returns the rule by which the rate changes, told after every step of `steps` in an epoch."""
    if training.schedule == "cosine":
        total = steps * training.epochs
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / steps, 0.5 * (1 + math.cos(math.pi * step / total)))
        )
    milestones = [round(part * training.epochs) * steps for part in training.milestones]
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)


def augmented(images: Float[Tensor, "n c h w"], reach: int) -> Float[Tensor, "n c h w"]:
    """Returns images moved by up to `reach` pixels, zeros coming in at the edge, and half of them mirrored.

    Example:
        >>> tuple(augmented(torch.ones(2, 3, 8, 8), 2).shape)
        (2, 3, 8, 8)
    """
    height, width = images.shape[2:]
    images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
    padded = nn.functional.pad(images, (reach, reach, reach, reach))
    moved = []
    for part in padded.split(_MOVED_AT_ONCE):
        row, column = torch.randint(2 * reach + 1, (2,)).tolist()
        moved.append(part[:, :, row : row + height, column : column + width])
    return torch.cat(moved)


def _batches(count: int, size: int) -> Iterator[Tensor]:
    # A last batch of one sample or two would make a step of nothing but noise.
    yield from torch.randperm(count)[: count - count % size].split(size)
