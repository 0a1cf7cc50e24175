"""Experiments with deep convolutional networks on CIFAR-10, without normalisation and biases (E5, E6)."""

from __future__ import annotations

from dataclasses import replace

from mergeot_experiments.catalogue.descriptions import FULL, QUICK, Design, Experiment, Method, Setting
from mergeot_experiments.catalogue.seeds import seeded
from mergeot_experiments.sources.training import Training

_SEEDS = (786, 234)
_METHODS = (
    *map(Method, ("average", "otfusion", "wb", "gwb", "weight-matching", "activation-matching")),
    *(Method("activation-matching", repair=repair) for repair in ("repair", "refit")),
)


def _pair(training: Training) -> Design:
    return Design((Setting("", "accuracy", seeded([training] * 2, [_SEEDS])),), _METHODS)


# The quick nets have half and a quarter of the width, and a learning rate that falls as a cosine.
_QUICK = Training(
    "vgg11",
    {"width": 32, "bias": False, "hidden": 256},
    "cifar10",
    0,
    24,
    "sgd",
    0.05,
    0.9,
    5e-4,
    128,
    schedule="cosine",
    augment=4,
    precision="bfloat16",
    start="he",
)
# arXiv:2210.06671: 300 epochs.
_FULL = replace(_QUICK, arguments={"width": 64, "bias": False, "hidden": 512}, epochs=300, precision="float32")
_QUICK_RESIDUAL = replace(_QUICK, architecture="resnet18", arguments={"width": 16}, epochs=12, decay=1e-4)
_FULL_RESIDUAL = replace(_FULL, architecture="resnet18", arguments={"width": 64}, decay=1e-4)

VGG = Experiment(
    "vgg",
    "VGG11 on CIFAR-10",
    "Two VGG11 without BatchNorm and biases; half the width and 24 epochs at the quick scale (E5)",
    {QUICK: lambda: _pair(_QUICK), FULL: lambda: _pair(_FULL)},
)
RESIDUAL_WITHOUT_NORM = Experiment(
    "residual-without-norm",
    "ResNet-18 without BatchNorm on CIFAR-10",
    "Two ResNet-18 without normalisation; a quarter of the width and 12 epochs at the quick scale (E6)",
    {QUICK: lambda: _pair(_QUICK_RESIDUAL), FULL: lambda: _pair(_FULL_RESIDUAL)},
)
