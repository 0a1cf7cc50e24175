"""Measure linear mode connectivity: the paths between two checkpoints, and the plane they lie on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_ot.errors import RecipeError
from mergekit_ot.fusion.calibration import calibration_inputs
from mergekit_ot.fusion.options import NO_REPAIR
from mergekit_ot.fusion.repair import AbstractRepair
from mergekit_ot.fusion.result import FusionResult
from mergekit_ot.hooks.manager import PluginManager
from mergekit_ot.hooks.methods import build
from mergekit_ot.jobs.aligning import align_pair, check_reference_order
from mergekit_ot.jobs.fusing import check_methods
from mergekit_ot.pictures.curves import check_picture_path, plot_barrier
from mergekit_ot.pictures.plane import plot_plane
from mergekit_ot.progress import Notify, Progress
from mergekit_ot.recipe import FusionRecipe
from mergekit_ot.scoring.path import BarrierCurve, Repair, State, barrier, check_same_shapes
from mergekit_ot.scoring.plane import LossPlane, check_grid, plane, plane_frame
from mergekit_ot.sources.datasets import TRAIN, DataSource, resolve_data
from mergekit_ot.sources.example_inputs import example_inputs_of
from mergekit_ot.sources.reading import ReadSource, read_sources
from mergekit_ot.storage.files import check_writable


@dataclass(frozen=True)
class Pictures:
    """What is drawn: the curves, and the plane with so many points per side."""

    curves: Path | None = None
    plane: Path | None = None
    plane_points: int = 21

    @property
    def paths(self) -> list[Path]:
        """The files that are written."""
        return [path for path in (self.curves, self.plane) if path is not None]


@dataclass(frozen=True)
class Connectivity:
    """How two models are connected; what was not asked for is None.

    Attributes:
        naive: The path between the models as they are.
        aligned: The path after alignment.
        naive_repaired: The naive path with the repair at every point between its ends.
        aligned_repaired: The aligned path with the repair at every point between its ends.
        plane: The plane through A, B and aligned B.
        solver: What aligned them.
        repair: What repaired them.
    """

    naive: BarrierCurve
    aligned: BarrierCurve | None
    naive_repaired: BarrierCurve | None
    aligned_repaired: BarrierCurve | None
    plane: LossPlane | None
    solver: str
    repair: str

    def as_json(self) -> dict[str, Any]:
        """Returns the object of ``mergeot barrier --json``."""
        content: dict[str, Any] = {**self.naive, "aligned": self.aligned}
        if self.naive_repaired is not None:
            content["repaired"] = {**self.naive_repaired, "aligned": self.aligned_repaired}
        if self.plane is not None:
            content["plane"] = self.plane
        return content

    def curves(self) -> dict[str, BarrierCurve]:
        """Returns the curves there are, by what a picture calls them."""
        labelled = {
            "naive": self.naive,
            f"naive + {self.repair}": self.naive_repaired,
            f"aligned ({self.solver})": self.aligned,
            f"aligned ({self.solver}) + {self.repair}": self.aligned_repaired,
        }
        return {label: curve for label, curve in labelled.items() if curve is not None}


def run_barrier(
    recipe: FusionRecipe,
    points: int,
    manager: PluginManager,
    notify: Notify,
    progress: Progress | None = None,
    *,
    align: bool = False,
    pictures: Pictures | None = None,
) -> Connectivity:
    """Evaluates the straight path between two checkpoints, as they are and, if asked, aligned and repaired.

    Args:
        recipe: Its two models, data, solver and repair.
        points: Points on the path, both ends included.
        manager: Whose solvers and repairs are used.
        notify: Told what was found.
        progress: Told what is done.
        align: Whether the recipe's solver aligns the second model to the first, for a path of its own.
        pictures: What to draw; a plane needs an alignment.

    Raises:
        MergeotError: Anything the user gave does not fit; nothing is written then.
    """
    drawn = pictures or Pictures()
    _check(recipe, manager, align, drawn)
    test = resolve_data(recipe.data or "", manager)
    first, second = read_sources(recipe.models, recipe.arch, manager, notify)
    states = first.module().state_dict(), second.module().state_dict()
    check_same_shapes(*states)
    paths = _Paths(states)
    repair = None if recipe.repair == NO_REPAIR else build(manager, "repair", recipe.repair)
    if align or repair is not None:
        given = _Given(first, second, test, resolve_data(recipe.data or "", manager, TRAIN))
        result, batches = _traced(given, recipe, manager, notify, progress, align)
        if align and drawn.plane is not None:
            check_reference_order(first, result, recipe.solver)
        paths = _paths_of(result, states, repair, batches, align)
    if drawn.plane is not None and paths.aligned is not None:
        plane_frame(first.make(), *states, paths.aligned[1])

    def curve(ends: tuple[State, State] | None, repaired: Repair | None = None) -> BarrierCurve | None:
        if ends is None:
            return None
        return barrier(first.make(), *ends, test, points, recipe.device, repair=repaired, progress=progress)

    naive = barrier(first.make(), *states, test, points, recipe.device, progress=progress)
    connectivity = Connectivity(
        naive=naive,
        aligned=curve(paths.aligned),
        naive_repaired=None if paths.naive_repair is None else curve(states, paths.naive_repair),
        aligned_repaired=None if paths.aligned_repair is None else curve(paths.aligned, paths.aligned_repair),
        plane=None,
        solver=recipe.solver,
        repair=recipe.repair,
    )
    if drawn.curves is not None:
        plot_barrier(connectivity.curves(), drawn.curves)
    if drawn.plane is None or paths.aligned is None:
        return connectivity
    surface = plane(
        first.make(), *states, paths.aligned[1], test, drawn.plane_points, device=recipe.device, progress=progress
    )
    plot_plane(surface, drawn.plane)
    if surface["clamped"]:
        notify(
            f"At {surface['clamped']} of {drawn.plane_points**2} points of the plane, running variances of "
            "BatchNorm had to be kept positive."
        )
    return replace(connectivity, plane=surface)


@dataclass(frozen=True)
class _Given:
    """The two models, and the data to measure on and to calibrate with."""

    first: ReadSource
    second: ReadSource
    test: DataSource
    calibration: DataSource


@dataclass(frozen=True)
class _Paths:
    """The ends of the paths that are evaluated, and what repairs the points between them."""

    naive: tuple[State, State]
    aligned: tuple[State, State] | None = None
    naive_repair: Repair | None = None
    aligned_repair: Repair | None = None


def _paths_of(
    result: FusionResult,
    states: tuple[State, State],
    repair: AbstractRepair | None,
    batches: tuple[tuple[Tensor, ...], ...],
    align: bool,
) -> _Paths:
    paths = _Paths(states)
    if align:
        ends = tuple(_like(states[0], result.aligned_state(number)) for number in (0, 1))
        paths = replace(paths, aligned=(ends[0], ends[1]))
    if repair is None:
        return paths
    unaligned = replace(result, alignment=replace(result.alignment, couplings={}))
    paths = replace(paths, naive_repair=_repair_of(repair, unaligned, states, batches))
    if paths.aligned is None:
        return paths
    return replace(paths, aligned_repair=_repair_of(repair, result, paths.aligned, batches))


def _check(recipe: FusionRecipe, manager: PluginManager, align: bool, pictures: Pictures) -> None:
    """Checks all that can be checked before a file is read."""
    if recipe.data is None:
        raise RecipeError("A barrier is measured on data: pass --data SPEC.")
    needing = {
        "--plane": pictures.plane is not None,
        "--measure": recipe.measure is not None,
        "--refine": recipe.refine,
        "--restarts": recipe.restarts > 1,
        "--solver-option": bool(recipe.solver_options),
    }
    for flag, is_given in needing.items():
        if is_given and not align:
            raise RecipeError(
                f"{flag} is about the alignment of B to A, and none is asked for: add --align SOLVER, such as "
                "--align weight-matching."
            )
    check_methods(recipe, manager)
    check_grid(pictures.plane_points)
    for path in pictures.paths:
        check_picture_path(path)
        check_writable(path)
    if len({path.resolve() for path in pictures.paths}) < len(pictures.paths):
        raise RecipeError(f"--plot and --plane are both '{pictures.plane}': give each a file of its own.")


def _traced(
    given: _Given,
    recipe: FusionRecipe,
    manager: PluginManager,
    notify: Notify,
    progress: Progress | None,
    align: bool,
) -> tuple[FusionResult, tuple[tuple[Tensor, ...], ...]]:
    """Returns the two models aligned (in place, if nothing else is asked for) and the inputs that a repair sees."""
    batches: tuple[tuple[Tensor, ...], ...] = ()
    if recipe.repair != NO_REPAIR:
        batches = calibration_inputs(given.calibration, recipe.calibration_size)
    inputs = batches[0] if batches else example_inputs_of(given.first, recipe.input_shape, given.test, notify)[0]
    pair = (given.first, given.second)
    # Only planned, two models keep every neuron where it is, and are traced all the same.
    result = align_pair(*pair, recipe, inputs, given.calibration, manager, progress, dry_run=not align)
    for warning in result.warnings:
        # That a network with BatchNorm needs a repair is no news where one was asked for.
        if not batches or "--repair" not in warning:
            notify(f"warning: {warning}")
    return result, batches


def _repair_of(
    repair: AbstractRepair,
    result: FusionResult,
    ends: tuple[State, State],
    batches: tuple[tuple[Tensor, ...], ...],
) -> Repair:
    """Returns the repair of a point on the path between two states that a fusion brought into one order."""

    def repaired(state: State, t: float) -> State:
        return repair.repair(result.repair_context(state, (1 - t, t), batches, aligned=ends))

    return repaired


def _like(reference: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state in the reference's dtypes."""
    return {name: value.to(reference[name].dtype) for name, value in state.items()}
