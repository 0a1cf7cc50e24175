"""Experiments with recurrent networks that read an image row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mergeot_experiments.catalogue.descriptions import DIGITS, FULL, QUICK, Design, Experiment, Method, Setting, Target
from mergeot_experiments.catalogue.seeds import seeded, windows
from mergeot_experiments.sources.training import Training

_SEEDS = (847, 53, 43, 348, 437, 82)
_REPETITIONS = 5
# arXiv:2210.06671: pixels in [0, 1], Adam. Fewer epochs than the paper's 20 at the quick scale.
_MNIST = Training("rows", {}, "mnist-54000", 0, 5, "adam", 1e-3, 0.0, 1e-5)
_MNIST_LONG = replace(_MNIST, epochs=20)
_DIGITS = Training("rows", {}, "digits", 0, 10, "adam", 3e-3, 0.0, 1e-5)
_METHODS = (Method("wb"), Method("gwb"))
# What signs and outgoing weights add: without both and at alpha 1 it is plain fused Gromov-Wasserstein.
_LESS = (
    Method("gwb", {"alpha": 1, "outgoing": False, "signs": False}),
    Method("gwb", {"signs": False}),
)
_REFITTED = Method("gwb", repair="refit")
_DIGIT_ROWS = {"columns": 8}


def _cells(training: Training, cells: Mapping[str, Mapping[str, object]]) -> Design:
    settings = tuple(
        Setting("", title, seeded([replace(training, arguments=arguments)] * 2, windows(_SEEDS, 2, _REPETITIONS)))
        for title, arguments in cells.items()
    )
    return Design(settings, (Method("average"), Method("wb"), *_LESS, Method("gwb"), _REFITTED))


RECURRENT = Experiment(
    "recurrent",
    "Recurrent networks that read MNIST by rows",
    "RNN, LSTM and two-layer GRU: average, input weights only (wb), with the hidden weights (gwb) (E7, E8)",
    {
        QUICK: lambda: _cells(
            _MNIST,
            {
                "RNN 128": {"cell": "rnn", "hidden": 128, "layers": 1},
                "LSTM 128": {"cell": "lstm", "hidden": 128, "layers": 1},
                "GRU 2 × 96": {"cell": "gru", "hidden": 96, "layers": 2},
            },
        ),
        FULL: lambda: _cells(
            _MNIST_LONG,
            {
                "RNN 256": {"cell": "rnn", "hidden": 256, "layers": 1},
                "LSTM 256": {"cell": "lstm", "hidden": 256, "layers": 1},
                "GRU 2 × 128": {"cell": "gru", "hidden": 128, "layers": 2},
            },
        ),
        DIGITS: lambda: _cells(
            _DIGITS,
            {
                "RNN 16": {"cell": "rnn", "hidden": 16, "layers": 1, **_DIGIT_ROWS},
                "LSTM 16": {"cell": "lstm", "hidden": 16, "layers": 1, **_DIGIT_ROWS},
            },
        ),
    },
)


def _two_widths(training: Training, widths: Sequence[int], more: Mapping[str, object]) -> Design:
    arguments = {width: {"cell": "lstm", "hidden": width, "layers": 1, **more} for width in widths}
    trainings = [replace(training, arguments=arguments[width]) for width in widths]
    sources = seeded(trainings, windows(_SEEDS, 2, _REPETITIONS))
    roles = tuple(f"LSTM {width}" for width in widths)
    settings = tuple(
        Setting(" + ".join(roles), f"into {width}", sources, Target("rows", arguments[width]), roles=roles)
        for width in widths
    )
    return Design(settings, _METHODS)


RECURRENT_LONG = Experiment(
    "recurrent-long",
    "A recurrent network trained for 20 epochs",
    "LSTM-128 with the paper's number of epochs: half an hour of training on one core (E8)",
    {
        QUICK: lambda: _cells(_MNIST_LONG, {"LSTM 128": {"cell": "lstm", "hidden": 128, "layers": 1}}),
        FULL: lambda: _cells(_MNIST_LONG, {"LSTM 256": {"cell": "lstm", "hidden": 256, "layers": 1}}),
        DIGITS: lambda: _cells(_DIGITS, {"LSTM 16": {"cell": "lstm", "hidden": 16, "layers": 1, **_DIGIT_ROWS}}),
    },
)


def _growth(training: Training, width: int, more: Mapping[str, object]) -> Design:
    arguments = {"cell": "lstm", "hidden": width, "layers": 1, **more}
    sources = seeded([replace(training, arguments=arguments)] * 2, windows(_SEEDS, 2, _REPETITIONS))
    settings = tuple(
        Setting("", f"× {factor:g}", sources, Target("rows", {**arguments, "hidden": round(factor * width)}))
        for factor in (1, 1.1, 1.25, 1.5, 2)
    )
    return Design(settings, (Method("gwb"),))


RECURRENT_GROWTH = Experiment(
    "recurrent-growth",
    "Two LSTMs fused into wider and wider ones",
    "hidden widths of the fused model from 1 to 2 times those of two LSTM-128",
    {
        QUICK: lambda: _growth(_MNIST, 128, {}),
        FULL: lambda: _growth(_MNIST_LONG, 256, {}),
        DIGITS: lambda: _growth(_DIGITS, 16, _DIGIT_ROWS),
    },
)


RECURRENT_WIDTHS = Experiment(
    "recurrent-widths",
    "LSTMs of different widths",
    "an LSTM of 128 neurons with one of 192, fused into either width",
    {
        QUICK: lambda: _two_widths(_MNIST, (128, 192), {}),
        FULL: lambda: _two_widths(_MNIST_LONG, (256, 384), {}),
        DIGITS: lambda: _two_widths(_DIGITS, (16, 24), _DIGIT_ROWS),
    },
)
