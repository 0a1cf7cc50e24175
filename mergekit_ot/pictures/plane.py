"""Pictures of the loss landscape on a plane; matplotlib is imported when one is drawn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_ot.pictures.curves import check_picture_path
from mergekit_ot.pictures.figures import save_figure

if TYPE_CHECKING:
    from mergekit_ot.scoring.plane import LossPlane, PlacedModel

# Even in lightness, and read the same by colour-blind readers: dark is low.
_COLOURS = "viridis"
# Of colours, highest to lowest: no less, so that a flat path has a landscape around it; no more, for losses near zero.
_LEAST_RANGE, _LARGEST_RANGE = 3.0, 300.0
# Higher than the last level, for what is not finite.
_ABOVE = 10.0
# Round numbers per decade, the finest first, and how many levels tell a picture apart.
_ROUND = (
    (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8),
    (1, 1.5, 2, 3, 4, 5, 7),
    (1, 2, 3, 5, 7),
    (1, 2, 5),
    (1,),
)
_MOST_LEVELS = 15
_MARKERS = {"A": "o", "B": "o", "aligned B": "D", "fused": "s"}


def plot_plane(plane: LossPlane, path: str | Path, title: str = "", *, overwrite: bool = False) -> Path:
    """Draws a plane: contours of loss and error side by side, with the models on it.

    A and B are circles, aligned B a diamond, the fused model (the midpoint of A and aligned B) a square; the naive path
    is dashed, the aligned one solid. Axes are distances in parameter space. Colours follow the logarithm and end at
    the highest value of the naive path, so that the basin is seen; all that is higher has one colour.

    Args:
        plane: What `mergekit_ot.plane` returned.
        path: A ``.png``, ``.pdf`` or ``.svg`` file.
        title: A line above the panels.
        overwrite: Whether a file that mergeot did not write may be replaced.

    Returns:
        The path.

    Raises:
        RecipeError: The extension names no picture format, or matplotlib is missing.
        CheckpointError: The file cannot be written.

    Example:
        >>> import tempfile
        >>> where = {"A": (0.0, 0.0), "B": (2.0, 0.0), "aligned B": (1.0, 1.0), "fused": (0.5, 0.5)}
        >>> models = {name: {"x": x, "y": y, "loss": 0.1, "accuracy": None} for name, (x, y) in where.items()}
        >>> plane = {"x": [0.0, 2.0], "y": [0.0, 1.0], "loss": [[0.1, 0.9], [0.4, 0.1]], "accuracy": None}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_plane(plane | {"models": models, "clamped": 0}, f"{folder}/plane.png").name
        'plane.png'
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    check_picture_path(path)
    panels: dict[str, Sequence[Sequence[float]]] = {"loss": plane["loss"]}
    if plane["accuracy"] is not None:
        panels["error (%)"] = [_errors(row) for row in plane["accuracy"]]
    width, height = plane["x"][-1] - plane["x"][0], plane["y"][-1] - plane["y"][0]
    tall = min(max(3.6 * height / width, 1.6), 4.8) + (1.0 if title else 0.7)
    figure = Figure(figsize=(4.6 * len(panels), tall), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (label, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _draw_surface(figure, axes, plane, label, values)
        _draw_models(axes, plane["models"])
    if title:
        figure.suptitle(title, fontsize=11)
    save_figure(figure, path, overwrite=overwrite)
    return path


def _errors(accuracies: Sequence[float]) -> list[float]:
    return [100 - accuracy for accuracy in accuracies]


def _draw_surface(figure: Any, axes: Any, plane: LossPlane, label: str, values: Sequence[Sequence[float]]) -> None:
    """Draws filled contours of the logarithm, with a colour bar beside them as high as the panel."""
    import numpy as np

    low, high = colour_limits(plane, values)
    levels = contour_levels(low, high)
    heights = np.asarray(values, dtype=float)
    # What is not finite is as high as can be. The logarithm is what is drawn, so that it is interpolated, too.
    heights = np.log10(np.clip(np.where(np.isfinite(heights), heights, np.inf), levels[0], _ABOVE * levels[-1]))
    edges = np.log10(levels)
    drawn = axes.contourf(plane["x"], plane["y"], heights, levels=edges, cmap=_COLOURS, extend="max")
    # Vector formats show the background between the bands, unless each band has an edge of its own colour.
    drawn.set_edgecolor("face")
    axes.contour(
        plane["x"], plane["y"], heights, levels=edges, colors="white", linewidths=0.4, linestyles="solid", alpha=0.6
    )
    bar = figure.colorbar(drawn, cax=axes.inset_axes((1.03, 0.0, 0.045, 1.0)), spacing="proportional")
    shown = [value for value in levels if f"{value:e}"[0] in "125" and f"{value:e}"[2] == "0"]
    shown = shown if len(shown) > 2 else levels[::2]
    bar.set_ticks([math.log10(value) for value in shown], labels=[f"{value:g}" for value in shown])
    bar.ax.minorticks_off()
    bar.outline.set_linewidth(0.6)
    axes.set_title(label, fontsize=11)
    axes.set_xlabel("distance from A towards B")
    axes.set_ylabel("distance from the line A–B")
    axes.set_aspect("equal")


def contour_levels(low: float, high: float) -> list[float]:
    """Returns round numbers, about evenly spaced in the logarithm: the first at most `low`, the last at least `high`.

    Example:
        >>> contour_levels(0.071, 0.4)
        [0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4]
    """
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    rounds = next(rounds for rounds in _ROUND if len(rounds) * math.log10(high / low) <= _MOST_LEVELS)
    candidates = [float(f"{number}e{decade}") for decade, number in itertools.product(decades, rounds)]
    first = max(value for value in candidates if value <= low)
    last = min(value for value in candidates if value >= high)
    return [value for value in candidates if first <= value <= last]


def colour_limits(plane: LossPlane, values: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Returns where colours begin and end: the least value, and the highest of the naive path.

    Args:
        plane: Where the values are.
        values: Row by row.

    Example:
        >>> where = {"A": (0.0, 0.0), "B": (2.0, 0.0)}
        >>> models = {name: {"x": x, "y": y, "loss": 0.1, "accuracy": None} for name, (x, y) in where.items()}
        >>> losses = [[0.1, 0.9], [5.0, 0.2]]
        >>> plane = {"x": [0.0, 2.0], "y": [0.0, 1.0], "loss": losses, "accuracy": None}
        >>> colour_limits(plane | {"models": models, "clamped": 0}, losses)
        (0.1, 0.9)
    """
    ends = sorted((plane["models"]["A"]["x"], plane["models"]["B"]["x"]))
    row = min(range(len(plane["y"])), key=lambda index: abs(plane["y"][index]))
    naive = [value for x, value in zip(plane["x"], values[row], strict=True) if ends[0] <= x <= ends[1]]
    finite = [value for value in itertools.chain(*values) if math.isfinite(value)]
    low, high = min(finite, default=0.0), max((value for value in naive if math.isfinite(value)), default=0.0)
    # Without a barrier the basin fills the path, and its walls are shown.
    high = max(high, _LEAST_RANGE * low) or 1.0
    return max(low, high / _LARGEST_RANGE), high


def _draw_models(axes: Any, models: Mapping[str, PlacedModel]) -> None:
    """Marks the models, the naive path between A and B, and the aligned one."""
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.5, foreground="black")]
    for end, style in (("B", "--"), ("aligned B", "-")):
        path = [models["A"], models[end]]
        across, up = [model["x"] for model in path], [model["y"] for model in path]
        axes.plot(across, up, style, color="white", linewidth=1.2, path_effects=halo)
    for name, model in models.items():
        axes.plot(
            model["x"], model["y"], _MARKERS[name], color="white", markeredgecolor="black", markersize=7, zorder=5
        )
        axes.annotate(
            name,
            (model["x"], model["y"]),
            xytext=(7, 5),
            textcoords="offset points",
            fontsize=9,
            color="white",
            path_effects=halo,
            zorder=6,
        )
