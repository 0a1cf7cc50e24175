"""Experiments with multilayer perceptrons: how many sources, other widths, growing widths, different data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement

from mergeot_experiments.catalogue.descriptions import DIGITS, FULL, QUICK, Design, Experiment, Method, Setting, Target
from mergeot_experiments.catalogue.seeds import seeded, windows
from mergeot_experiments.sources.training import Training

_SEEDS = (43, 348, 437, 82, 233, 31, 786, 234)
_UNEVEN_SEEDS = (786, 234, 7, 12, 31)
_REPETITIONS = 5
_REFITTED = (Method("wb", repair="refit"), Method("weight-matching", repair="refit"))
_SOLVERS = ("average", "otfusion", "wb", "gwb", "weight-matching")


@dataclass(frozen=True)
class _Frame:
    """What the networks of one scale share: inputs, outputs, data, and how they are trained."""

    inputs: int
    training: Training

    def network(self, widths: str) -> Training:
        """Returns the training of a perceptron with these hidden widths."""
        return replace(self.training, arguments=self.arguments(widths))

    def target(self, widths: str) -> Target:
        """Returns the sizes of a perceptron with these hidden widths."""
        return Target(self.training.architecture, self.arguments(widths))

    def arguments(self, widths: str) -> dict[str, object]:
        """Returns the arguments of the architecture."""
        return {"sizes": f"{self.inputs}-{widths}-10", "bias": False}


# arXiv:2210.06671: no biases, 20 epochs of SGD.
_MNIST = _Frame(784, Training("mlp", {}, "mnist-normalised-54000", 0, 20, "sgd", 0.05, 0.5))
_DIGITS = _Frame(64, Training("mlp", {}, "digits", 0, 20, "sgd", 0.05, 0.9))


def _several(frame: _Frame, widths: str, repetitions: int) -> Design:
    network = frame.network(widths)
    # Entropic couplings of more than two models take minutes for each set.
    entropic = tuple(Method("wb", {"epsilon": epsilon}) for epsilon in (0.001, 0.01, 0.1))
    settings = []
    for count in (2, 4, 6):
        sources = seeded([network] * count, windows(_SEEDS, count, repetitions))
        settings.append(Setting("", f"{count} models", sources, more=entropic if count == 2 else ()))
    return Design(tuple(settings), (*map(Method, _SOLVERS), Method("wb", refine=True), *_REFITTED))


MLP = Experiment(
    "mlp",
    "Multilayer perceptrons from different seeds",
    "2, 4 and 6 perceptrons 784-400-200-100-10 of MNIST, every solver and entropic couplings (E1)",
    {
        QUICK: lambda: _several(_MNIST, "400-200-100", _REPETITIONS),
        FULL: lambda: _several(_MNIST, "400-200-100", len(_SEEDS)),
        DIGITS: lambda: _several(_DIGITS, "40-20-10", _REPETITIONS),
    },
)


def _widths(frame: _Frame, widths: dict[str, str], repetitions: int) -> Design:
    pairs = windows(_SEEDS[:repetitions], 2, repetitions)
    settings = []
    for first, second in combinations_with_replacement(widths, 2):
        trainings = [frame.network(widths[name]) for name in (first, second)]
        roles = () if first == second else (first, second)
        settings += [
            Setting(f"{first} + {second}", f"into {name}", seeded(trainings, pairs), frame.target(size), roles=roles)
            for name, size in widths.items()
        ]
    # One source alone, fused into a smaller network: compression without training.
    names = list(widths)
    for place, name in enumerate(names):
        sources = seeded([frame.network(widths[name])], [pair[:1] for pair in pairs])
        for smaller in names[:place]:
            settings.append(Setting(f"{name} alone", f"into {smaller}", sources, frame.target(widths[smaller])))
    return Design(tuple(settings), (Method("wb"), Method("gwb")))


_MNIST_WIDTHS = {"small": "200-100-50", "middle": "400-200-100", "large": "800-400-200"}

WIDTHS = Experiment(
    "widths",
    "Perceptrons of different widths",
    "small 200-100-50, middle 400-200-100, large 800-400-200: every pair into every width; one alone, compressed (E2, E3)",  # noqa: E501
    {
        QUICK: lambda: _widths(_MNIST, _MNIST_WIDTHS, _REPETITIONS),
        FULL: lambda: _widths(_MNIST, _MNIST_WIDTHS, len(_SEEDS)),
        DIGITS: lambda: _widths(_DIGITS, {"small": "20-10", "middle": "40-20", "large": "80-40"}, _REPETITIONS),
    },
)


def _growth(frame: _Frame, widths: Sequence[int], repetitions: int) -> Design:
    network = frame.network("-".join(map(str, widths)))
    sources = seeded([network] * 2, windows(_SEEDS, 2, repetitions))
    settings = []
    for factor in (1, 1.1, 1.25, 1.5, 1.75, 2):
        grown = "-".join(str(round(factor * width)) for width in widths)
        settings.append(Setting("", f"× {factor:g}", sources, frame.target(grown)))
    return Design(tuple(settings), (Method("wb"),))


GROWTH = Experiment(
    "growth",
    "Two perceptrons fused into wider and wider ones",
    "hidden widths of the fused model from 1 to 2 times those of the sources 784-400-200-100-10",
    {
        QUICK: lambda: _growth(_MNIST, (400, 200, 100), _REPETITIONS),
        FULL: lambda: _growth(_MNIST, (400, 200, 100), len(_SEEDS)),
        DIGITS: lambda: _growth(_DIGITS, (40, 20, 20), _REPETITIONS),
    },
)


def _heterogeneous(first: Training, second: Training, shares: Sequence[float]) -> Design:
    # Source B of a set has another seed than source A: the next one.
    sources = seeded([first, second], windows(_UNEVEN_SEEDS, 2, len(_UNEVEN_SEEDS)))
    settings = tuple(
        Setting("", f"λ = {share:g}", sources, model_weights=(share, 1 - share), roles=("A", "B")) for share in shares
    )
    return Design(settings, tuple(map(Method, _SOLVERS)))


def _uneven(frame: _Frame, widths: str, shares: Sequence[float], rate: float) -> Design:
    network, data = frame.network(widths), frame.training.data
    return _heterogeneous(
        replace(network, data=f"{data}-special", rate=rate, momentum=0.5, epochs=10),
        replace(network, data=f"{data}-rest", rate=rate, momentum=0.9, epochs=20),
        shares,
    )


# A tenth of the digits is so few that their batches must be small.
_FEW_DIGITS = replace(_DIGITS, training=replace(_DIGITS.training, batch=16))
_TENTHS = tuple(tenth / 10 for tenth in range(1, 10))

HETEROGENEOUS = Experiment(
    "heterogeneous",
    "Sources that saw different digits",
    "A saw all images of 4 and a tenth of the others, B the other nine tenths and no 4; λ is the weight of A (E4)",
    {
        QUICK: lambda: _uneven(_MNIST, "200-100-50", _TENTHS, rate=0.01),
        FULL: lambda: _uneven(_MNIST, "400-200-100", _TENTHS, rate=0.01),
        DIGITS: lambda: _uneven(_FEW_DIGITS, "40-20", (0.3, 0.5, 0.7), rate=0.05),
    },
)
