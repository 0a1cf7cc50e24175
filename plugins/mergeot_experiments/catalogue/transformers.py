"""The experiments with transformers of others: one small network of each family, and deeper ones of two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mergeot_experiments.catalogue.descriptions import DIGITS, FULL, LOSS, QUICK, Design, Experiment, Method, Setting
from mergeot_experiments.catalogue.seeds import seeded, windows
from mergeot_experiments.sources.training import Training

_ORDERS = {"symmetry": "permutation"}
# What each solver may do besides reordering is measured by what it makes of orders alone.
_METHODS = (
    Method("average"),
    Method("wb"),
    Method("weight-matching", _ORDERS),
    Method("weight-matching"),
    Method("activation-matching", _ORDERS),
    Method("activation-matching"),
    Method("weight-matching", repair="refit"),
    Method("activation-matching", repair="refit"),
)
_SEEDS = (1, 2, 3, 4, 5)
# Symbols of the characters and of the gray levels; a masked network has one more.
_CHARACTERS, _LEVELS = 65, 17


@dataclass(frozen=True)
class _Family:
    """How the networks of a family are trained.

    Attributes:
        architecture: A registered one.
        data: What it is trained on; what begins with ``tokens`` is of characters, or of gray levels of digits.
        epochs: Passes over 6,000 sequences, or over the digits.
        rate: Of Adam, at its highest.
        arguments: Of the architecture, where data do not decide them.
        extra: Symbols that its vocabulary has besides those of the data.
    """

    architecture: str
    data: str
    epochs: int
    rate: float
    arguments: Mapping[str, object] = field(default_factory=dict)
    extra: int = 0

    def training(self, kind: str, symbols: int, epochs: int) -> Training:
        """Returns the training on characters or levels, with so many times the epochs."""
        arguments = dict(self.arguments)
        if self.data.startswith("tokens"):
            arguments["vocabulary"] = symbols + self.extra
        data = self.data.replace("tokens", kind)
        return Training(
            self.architecture, arguments, data, 0, self.epochs * epochs, "adam", self.rate, schedule="cosine", batch=32
        )


_FAMILIES = {
    "BERT": _Family("small-bert", "tokens-hidden", 3, 2e-3, extra=1),
    "GPT-2": _Family("small-gpt2", "tokens-next", 3, 3e-3),
    "Llama": _Family("small-llama", "tokens-next", 3, 3e-3),
    "T5": _Family("small-t5", "tokens-halves", 3, 3e-3),
    "ViT": _Family("small-vit", "digits", 15, 1e-3),
    "Whisper": _Family("small-whisper", "digits-in-a-row", 4, 2e-3),
}


def _design(kind: str, symbols: int, epochs: int = 1) -> Design:
    settings = []
    for name, family in _FAMILIES.items():
        training = family.training(kind, symbols, epochs)
        settings.append(Setting(name, "loss", seeded([training] * 2, windows(_SEEDS, 2, len(_SEEDS)))))
    return Design(tuple(settings), _METHODS)


TRANSFORMERS = Experiment(
    "transformers",
    "Transformers of six families",
    "networks of 2 layers and width 64 by configurations of the library transformers, from two seeds: cross-entropy on "
    "characters of tiny Shakespeare (BERT: 30 % hidden; T5: the second half of a window), on the digits (ViT), and on "
    "digits in a row (Whisper)",
    {
        QUICK: lambda: _design("characters", _CHARACTERS),
        FULL: lambda: _design("characters", _CHARACTERS, epochs=3),
        DIGITS: lambda: _design("levels", _LEVELS),
    },
    metric=LOSS,
)


def _deep_gpt2(kind: str, symbols: int, width: int, layers: int, epochs: int) -> Training:
    sizes = {"vocabulary": symbols, "width": width, "inner": 4 * width, "layers": layers}
    return _adam("small-gpt2", sizes, f"{kind}-next", 2e-3, epochs, 32)


def _deep_vit(data: str, image: Mapping[str, object], width: int, layers: int, epochs: int) -> Training:
    sizes = {**image, "width": width, "inner": 4 * width, "layers": layers}
    return _adam("small-vit", sizes, data, 1e-3, epochs, 128)


def _adam(
    architecture: str, arguments: Mapping[str, object], data: str, rate: float, epochs: int, batch: int
) -> Training:
    return Training(architecture, arguments, data, 0, epochs, "adam", rate, batch=batch, schedule="cosine")


def _deep(gpt2: Training, vit: Training) -> Design:
    pairs = {"GPT-2": gpt2, "ViT": vit}
    seeds = windows(_SEEDS, 2, len(_SEEDS))
    settings = [Setting(name, "loss", seeded([each] * 2, seeds)) for name, each in pairs.items()]
    return Design(tuple(settings), _METHODS)


def _quick() -> Design:
    gpt2 = replace(_deep_gpt2("characters", _CHARACTERS, 128, 4, 5), precision="bfloat16")
    image = {"size": 32, "square": 8, "channels": 3}
    return _deep(gpt2, replace(_deep_vit("cifar10", image, 128, 4, 2), batch=64))


def _full() -> Design:
    gpt2 = _deep_gpt2("characters", _CHARACTERS, 256, 6, 8)
    image = {"size": 32, "square": 4, "channels": 3}
    return _deep(gpt2, replace(_deep_vit("cifar10", image, 256, 6, 100), augment=4))


DEEP_TRANSFORMERS = Experiment(
    "transformers-deep",
    "Deeper transformers of two families",
    "a GPT-2 of 4 layers of 128 on characters of tiny Shakespeare and a ViT of the same size on CIFAR-10, from two "
    "seeds: cross-entropy; 6 layers of 256 at full scale",
    {
        QUICK: _quick,
        FULL: _full,
        DIGITS: lambda: _deep(_deep_gpt2("levels", _LEVELS, 32, 4, 2), _deep_vit("digits", {}, 32, 4, 4)),
    },
    metric=LOSS,
)
