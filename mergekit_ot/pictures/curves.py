"""Pictures of results; matplotlib is imported when one is drawn."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_ot.errors import RecipeError
from mergekit_ot.pictures.figures import save_figure

if TYPE_CHECKING:
    from mergekit_ot.scoring.path import BarrierCurve

# Colours that stay apart in print and for colour-blind readers (Okabe and Ito); the naive curve is grey.
_NAIVE = "#7f7f7f"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
# More markers on a curve run into each other.
_MOST_MARKERS = 20
_FORMATS = ("png", "pdf", "svg")


def check_picture_path(path: Path) -> None:
    """Checks that a picture can be drawn: the extension names a format, and matplotlib is installed.

    Raises:
        RecipeError: It cannot.

    Example:
        >>> check_picture_path(Path("curve.svg"))
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise RecipeError('A picture needs matplotlib. Install it with: pip install "mergekit-ot[demo]".')
    if path.suffix.lower().lstrip(".") not in _FORMATS:
        raise RecipeError(f"'{path}' is no picture: use the extension {', '.join('.' + kind for kind in _FORMATS)}.")


def plot_barrier(
    curves: Mapping[str, BarrierCurve], path: str | Path, title: str = "", *, overwrite: bool = False
) -> Path:
    """Draws the paths between two models: accuracy and loss over t, one curve per alignment.

    Args:
        curves: Label → what `mergekit_ot.barrier` returned; the first is drawn in grey, as the baseline.
        path: A ``.png``, ``.pdf`` or ``.svg`` file.
        title: A line above the panels.
        overwrite: Whether a file that mergeot did not write may be replaced.

    Returns:
        The path.

    Raises:
        RecipeError: The extension names no picture format.
        CheckpointError: The file cannot be written.

    Example:
        >>> import tempfile
        >>> flat = {"t": [0.0, 1.0], "loss": [0.1, 0.1], "accuracy": [97.0, 97.0]}
        >>> flat |= {"loss_barrier": 0.0, "error_barrier": 0.0}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_barrier({"naive": flat}, f"{folder}/curve.png").name
        'curve.png'
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    check_picture_path(path)
    has_accuracy = all(curve["accuracy"] is not None for curve in curves.values())
    panels = ["accuracy", "loss"] if has_accuracy else ["loss"]
    height = (3.4 if title else 3.2) + 0.2 * len(curves)
    figure = Figure(figsize=(4.4 * len(panels), height), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for index, (label, curve) in enumerate(curves.items()):
            _draw_curve(axes, index, label, curve, panel)
        _dress(axes, panel)
    if title:
        figure.suptitle(title, fontsize=11)
    save_figure(figure, path, overwrite=overwrite)
    return path


def _draw_curve(axes: Any, index: int, label: str, curve: BarrierCurve, panel: str) -> None:
    values = curve["accuracy"] if panel == "accuracy" else curve["loss"]
    height = curve["error_barrier"] if panel == "accuracy" else curve["loss_barrier"]
    shown = ""
    if height is not None and math.isfinite(height):
        shown = f"  (barrier {height:.1f} points)" if panel == "accuracy" else f"  (barrier {height:.2g})"
    colour = _NAIVE if index == 0 else _COLOURS[(index - 1) % len(_COLOURS)]
    axes.plot(
        curve["t"],
        values,
        color=colour,
        label=f"{label}{shown}",
        linestyle="--" if index == 0 else "-",
        linewidth=1.6,
        marker=_MARKERS[index % len(_MARKERS)],
        markersize=4,
        markevery=1 + len(curve["t"]) // _MOST_MARKERS,
    )


def _dress(axes: Any, panel: str) -> None:
    axes.set_xlabel("t   (0: model A, 1: model B)")
    axes.set_ylabel("accuracy (%)" if panel == "accuracy" else "loss")
    axes.set_xlim(-0.02, 1.02)
    if panel == "loss":
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    # Above the panel, where no curve can hide behind it.
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), fontsize=8, frameon=False, borderaxespad=0.2)
