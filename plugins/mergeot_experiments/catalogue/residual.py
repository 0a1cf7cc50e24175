"""The experiment with residual networks of different widths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mergeot_experiments.catalogue.descriptions import FULL, QUICK, Design, Experiment, Method, Setting, Target
from mergeot_experiments.catalogue.seeds import seeded, windows
from mergeot_experiments.sources.training import Training

_SEEDS = (786, 234, 7, 12, 31)
_WIDTHS = (16, 24)


def _residual(training: Training) -> Design:
    arguments: dict[int, Mapping[str, object]] = {width: {"width": width, "in_channels": 1} for width in _WIDTHS}
    settings = []
    for width in _WIDTHS:
        # The source of the fused width comes first: the repair tries its procedure on the first one, which must then
        # be a permuted copy and no resized one.
        order = sorted(_WIDTHS, key=lambda other, width=width: other != width)
        # The seeds of a pair belong to the widths, in whichever order these come.
        seeds = [pair if order[0] == _WIDTHS[0] else pair[::-1] for pair in windows(_SEEDS, 2, len(_SEEDS))]
        sources = seeded([replace(training, arguments=arguments[other]) for other in order], seeds)
        roles = tuple(f"width {other}" for other in order)
        target = Target(training.architecture, arguments[width])
        # A fused network has other means and variances than its sources: BatchNorm needs the repair.
        settings.append(Setting("", f"into {width}", sources, target, repair="reset", roles=roles))
    return Design(tuple(settings), (Method("wb"), Method("gwb")))


_DIGITS = Training("resnet20", {}, "digits", 0, 20, "sgd", 0.1, 0.9, 5e-4, milestones=(0.5, 0.75))
_MNIST = replace(_DIGITS, data="mnist-normalised-54000", epochs=10)

RESIDUAL = Experiment(
    "residual",
    "Residual networks of different widths",
    "ResNet-20 of width 16 with one of width 24, BatchNorm re-estimated; on the digits, and on MNIST at full scale",
    {
        QUICK: lambda: _residual(_DIGITS),
        FULL: lambda: _residual(_MNIST),
    },
)
