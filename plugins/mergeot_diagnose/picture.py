"""The picture of a diagnosis: layers on the left, the straight path on the right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergekit_ot import check_picture_path, save_figure
from mergeot_diagnose.findings import Diagnosis, LayerSimilarity, PairDiagnosis

# Colours that stay apart in print and for colour-blind readers (Okabe and Ito); the path as it is is grey.
_CKA, _PLACE, _NAIVE, _ALIGNED = "#56B4E9", "#D55E00", "#7f7f7f", "#0072B2"
_MOST_LAYERS, _MOST_LETTERS = 40, 34


def plot_diagnosis(diagnosis: Diagnosis, path: str | Path, *, overwrite: bool = False) -> Path:
    """Draws a diagnosis: how similar the layers of each pair are, and the path between both where data were given.

    Args:
        diagnosis: What `diagnose` found.
        path: A ``.png``, ``.pdf`` or ``.svg`` file.
        overwrite: Whether a file that mergeot did not write may be replaced.

    Returns:
        The path.

    Raises:
        RecipeError: The extension names no picture format, or matplotlib is missing.
        CheckpointError: The file cannot be written.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from mergeot_diagnose import diagnose
        >>> nets = [nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)) for _ in range(2)]
        >>> found = diagnose(nets, data=[torch.randn(64, 4)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_diagnosis(found, f"{folder}/diagnosis.svg").name
        'diagnosis.svg'
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    check_picture_path(path)
    rows = [min(len(pair.layers), _MOST_LAYERS) for pair in diagnosis.pairs]
    heights = [max(2.4, 1.2 + 0.26 * count) for count in rows]
    has_paths = any(pair.naive is not None for pair in diagnosis.pairs)
    columns = 2 if has_paths else 1
    figure = Figure(figsize=(5.2 * columns, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for axes, pair in zip(grid, diagnosis.pairs, strict=True):
        _draw_layers(axes[0], pair)
        if has_paths:
            _draw_path(axes[1], pair)
    save_figure(figure, path, overwrite=overwrite)
    return path


def _draw_layers(axes: Any, pair: PairDiagnosis) -> None:
    """Draws a bar (CKA) and a dot (share of neurons that stand at the same place) for each layer, the first on top."""
    layers = pair.layers[:_MOST_LAYERS]
    _draw_bars(axes, layers)
    places = [(row, layer.same_place) for row, layer in enumerate(layers) if layer.same_place is not None]
    if places:
        rows, shares = zip(*places, strict=True)
        axes.plot(shares, rows, "o", color=_PLACE, markersize=4, label="neurons at the same place", clip_on=False)
    axes.set_yticks(range(len(layers)), [_short(layer.name) for layer in layers], fontsize=8)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    left_out = len(pair.layers) - len(layers)
    more = f" (the first {len(layers)} of {len(pair.layers)} layers)" if left_out else ""
    axes.set_title(f"{_named(pair)}{more}", fontsize=10, loc="left")
    _dress(axes)
    if layers:
        axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)


def _draw_bars(axes: Any, layers: Sequence[LayerSimilarity]) -> None:
    similar = [(row, layer.cka) for row, layer in enumerate(layers) if layer.cka is not None]
    if similar:
        rows, values = zip(*similar, strict=True)
        axes.barh(rows, values, height=0.6, color=_CKA, label="linear CKA")


def _draw_path(axes: Any, pair: PairDiagnosis) -> None:
    """Draws the accuracy, or the loss where there are no classes, along the path."""
    curves = {"as they are": (pair.naive, _NAIVE), f"after {pair.solver}": (pair.aligned, _ALIGNED)}
    for label, (curve, colour) in curves.items():
        if curve is not None:
            axes.plot(curve.t, curve.accuracy or curve.loss, "o-", color=colour, markersize=4, label=label)
    if pair.naive is None:
        axes.text(0.5, 0.5, "no path: sizes differ", ha="center", va="center", fontsize=9)
        axes.set_axis_off()
        return
    axes.set_ylabel("loss" if pair.naive.accuracy is None else "accuracy in %", fontsize=9)
    axes.set_xlabel("t", fontsize=9)
    axes.set_title(f"straight path: {pair.basin.value}", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False)
    _dress(axes)


def _dress(axes: Any) -> None:
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _named(pair: PairDiagnosis) -> str:
    first, second = (_short(Path(name).name) for name in pair.names)
    return f"{first} and {second}"


def _short(name: str) -> str:
    # What matplotlib would read as mathematics is written as it is.
    text = name if len(name) <= _MOST_LETTERS else f"…{name[1 - _MOST_LETTERS :]}"
    return text.replace("$", r"\$")
