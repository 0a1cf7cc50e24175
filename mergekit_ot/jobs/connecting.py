"""Measure linear mode connectivity: the paths between two checkpoints, and the plane they lie on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from mergekit_ot.errors import RecipeError
from mergekit_ot.fusion.calibration import CalibrationData, split_calibration
from mergekit_ot.fusion.options import NO_REPAIR
from mergekit_ot.fusion.repair import AbstractRepair, repaired_unless_worse
from mergekit_ot.fusion.result import FusionResult
from mergekit_ot.fusion.samples import with_limit
from mergekit_ot.fusion.written import template_of
from mergekit_ot.hooks.manager import PluginManager
from mergekit_ot.hooks.methods import build_repair
from mergekit_ot.jobs.aligning import align_pair, check_reference_order
from mergekit_ot.jobs.connectivity import Connectivity, Pictures
from mergekit_ot.jobs.fusing import check_methods
from mergekit_ot.jobs.places import input_files
from mergekit_ot.pictures.curves import check_picture_path, plot_barrier
from mergekit_ot.pictures.plane import plot_plane
from mergekit_ot.progress import Notify, Progress
from mergekit_ot.recipe import FusionRecipe
from mergekit_ot.scoring.path import BarrierCurve, Repair, State, barrier, check_same_shapes
from mergekit_ot.scoring.plane import LossPlane, PlaneFrame, check_grid, plane_frame, score_plane
from mergekit_ot.sources.datasets import TRAIN, DataSource, resolve_data
from mergekit_ot.sources.example_inputs import example_inputs_of
from mergekit_ot.sources.guesses import check_function_is_known
from mergekit_ot.sources.needs import needs_of
from mergekit_ot.sources.reading import ReadSource, read_sources
from mergekit_ot.storage.outputs import check_outputs


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
    request = _Request(recipe, points, manager, notify, progress, align, pictures or Pictures())
    _check(request)
    pair = _read(request)
    paths = _paths(request, pair)
    # Whether there is a plane is known before anything is evaluated, which may take hours.
    drawn = request.pictures
    frame = None if drawn.plane is None else _frame(paths)
    connectivity = _connectivity(request, pair, paths)
    if drawn.curves is not None:
        plot_barrier(connectivity.curves(), drawn.curves, overwrite=recipe.overwrite)
    if drawn.plane is None or frame is None:
        return connectivity
    make = pair.first.make if paths.aligned is None else paths.aligned.make
    surface = _surface(request, pair, frame, make())
    plot_plane(surface, drawn.plane, overwrite=recipe.overwrite)
    return replace(connectivity, plane=surface)


@dataclass(frozen=True)
class _Request:
    """What `run_barrier` was asked for."""

    recipe: FusionRecipe
    points: int
    manager: PluginManager
    notify: Notify
    progress: Progress | None
    align: bool
    pictures: Pictures


@dataclass(frozen=True)
class _Pair:
    """The two models, their states, and the data to measure on."""

    first: ReadSource
    second: ReadSource
    states: tuple[State, State]
    test: DataSource


@dataclass(frozen=True)
class _Path:
    """The ends of a path that is evaluated, and what repairs the points between them."""

    ends: tuple[State, State]
    make: Callable[[], nn.Module]
    repair: Repair | None = None


@dataclass(frozen=True)
class _Paths:
    """The paths that are evaluated; None for those that nobody asked for."""

    naive: _Path
    aligned: _Path | None = None
    unaligned: _Path | None = None
    naive_repaired: _Path | None = None
    aligned_repaired: _Path | None = None


def _check(request: _Request) -> None:
    """Checks all that can be checked before a file is read."""
    recipe, pictures = request.recipe, request.pictures
    if recipe.data is None:
        raise RecipeError("A barrier is measured on data: pass --data SPEC.")
    if not request.align:
        _check_nothing_is_about_an_alignment(recipe, pictures)
    check_methods(recipe, request.manager)
    check_grid(pictures.plane_points)
    for path in pictures.paths:
        check_picture_path(path)
    files = {"--plot": pictures.curves, "--plane": pictures.plane}
    check_outputs(files, input_files(recipe), overwrite=recipe.overwrite)


def _check_nothing_is_about_an_alignment(recipe: FusionRecipe, pictures: Pictures) -> None:
    needing = {
        "--plane": pictures.plane is not None,
        "--measure": recipe.measure is not None,
        "--refine": recipe.refine,
        "--restarts": recipe.restarts > 1,
        "--solver-option": bool(recipe.solver_options),
    }
    for flag, is_given in needing.items():
        if is_given:
            raise RecipeError(
                f"{flag} is about the alignment of B to A, and none is asked for: add --align SOLVER, such as "
                "--align weight-matching."
            )


def _read(request: _Request) -> _Pair:
    recipe, manager = request.recipe, request.manager
    test = resolve_data(recipe.data or "", manager)
    first, second = read_sources(recipe.models, recipe.arch, manager, request.notify, recipe.trust, recipe)
    check_function_is_known([(source.name, source.make) for source in (first, second)], "'mergeot barrier'")
    states = first.module().state_dict(), second.module().state_dict()
    check_same_shapes(*states)
    return _Pair(first, second, states, test.for_network(*needs_of([first], recipe, request.notify)))


def _calibration(request: _Request, pair: _Pair) -> DataSource:
    """Returns the data that a solver or a repair sees."""
    recipe = request.recipe
    data = resolve_data(recipe.data or "", request.manager, TRAIN)
    return data.for_network(*needs_of([pair.first], recipe, request.notify))


def _paths(request: _Request, pair: _Pair) -> _Paths:
    """Aligns and repairs as asked, and returns the paths to evaluate."""
    recipe = request.recipe
    naive = _Path(pair.states, pair.first.make)
    repair = None if recipe.repair == NO_REPAIR else build_repair(recipe.repair, recipe.repair_options, request.manager)
    if not request.align and repair is None:
        return _Paths(naive)
    result, data = _traced(request, pair)
    paths = _Paths(naive, _aligned(result, pair) if request.align else None, unaligned=_rewritten(result, pair))
    if repair is None:
        return paths
    in_place = result
    if result.models.normal is not None:
        # As the files are, which is not the form in which they were aligned.
        in_place = _planned(request, pair, data)
    in_place = replace(in_place, alignment=replace(in_place.alignment, couplings={}))
    return replace(
        paths,
        naive_repaired=_repaired(request, naive, repair, in_place, data),
        aligned_repaired=paths.aligned and _repaired(request, paths.aligned, repair, result, data),
    )


def _aligned(result: FusionResult, pair: _Pair) -> _Path:
    """Returns the path between the aligned models."""
    first, second = (_like(pair.states[0], result.aligned_state(number)) for number in (0, 1))
    return _Path((first, second), result.aligned_module)


def _rewritten(result: FusionResult, pair: _Pair) -> _Path:
    """Returns the path between the models in the form in which they are aligned, without the alignment."""
    first, second = (dict(result.models.rewritten(state, number)) for number, state in enumerate(pair.states))
    return _Path((first, second), result.aligned_module)


def _example_inputs(request: _Request, pair: _Pair, data: CalibrationData) -> tuple[Tensor, ...]:
    if data.batches:
        return data.batches[0]
    recipe = request.recipe
    return example_inputs_of(pair.first, recipe.input_shape, pair.test, request.notify, recipe.inputs)[0]


def _planned(request: _Request, pair: _Pair, data: CalibrationData) -> FusionResult:
    """Returns the two models traced and not aligned, each in the form of its file."""
    recipe, manager = request.recipe, request.manager
    inputs = _example_inputs(request, pair, data)
    given = _calibration(request, pair)
    return align_pair(pair.first, pair.second, recipe, inputs, given, manager, dry_run=True, may_rewrite=False)


def _traced(request: _Request, pair: _Pair) -> tuple[FusionResult, CalibrationData]:
    """Returns the two models aligned (in place, if nothing else is asked for) and the inputs that a repair sees."""
    recipe = request.recipe
    calibration = _calibration(request, pair)
    data = CalibrationData()
    if recipe.repair != NO_REPAIR:
        data = split_calibration(*with_limit(calibration, recipe))
        for note in data.notes:
            request.notify(note)
    inputs = _example_inputs(request, pair, data)
    # Only planned, two models keep every neuron where it is, and are traced all the same.
    result = align_pair(
        pair.first,
        pair.second,
        recipe,
        inputs,
        calibration,
        request.manager,
        request.progress,
        dry_run=not request.align,
    )
    for warning in result.warnings:
        # That a network with BatchNorm needs a repair is no news where one was asked for.
        if not data.batches or "--repair" not in warning:
            request.notify(f"warning: {warning}")
    if request.align:
        request.notify(result.extent.sentence)
    if request.pictures.plane is not None:
        check_reference_order(pair.first, result, recipe.solver)
    return result, data


def _like(reference: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state in the reference's dtypes."""
    return {name: value.to(reference[name].dtype) for name, value in state.items()}


def _repaired(
    request: _Request, path: _Path, repair: AbstractRepair, result: FusionResult, data: CalibrationData
) -> _Path:
    """Returns a path between two states that a fusion brought into one order, with a repair of every point.

    A point that the repair takes farther from the sources together is left as it is.
    """
    template = template_of(result.models.target, result.models.sources)

    def repaired(state: State, t: float) -> State:
        context = result.repair_context(state, (1 - t, t), data.batches, aligned=path.ends)
        name = request.recipe.repair
        mended, found = repaired_unless_worse(repair, name, context, result.models, data.held_out, template)
        for warning in () if found is None else found.warnings:
            request.notify(f"warning: at t = {t:.3g}: {warning}")
        return mended

    return replace(path, repair=repaired)


def _frame(paths: _Paths) -> PlaneFrame | None:
    if paths.aligned is None or paths.unaligned is None:
        return None
    return plane_frame(paths.aligned.make(), *paths.unaligned.ends, paths.aligned.ends[1])


def _connectivity(request: _Request, pair: _Pair, paths: _Paths) -> Connectivity:
    def curve(path: _Path) -> BarrierCurve:
        return barrier(
            path.make(),
            *path.ends,
            pair.test,
            request.points,
            request.recipe.device,
            repair=path.repair,
            progress=request.progress,
        )

    return Connectivity(
        naive=curve(paths.naive),
        aligned=paths.aligned and curve(paths.aligned),
        naive_repaired=paths.naive_repaired and curve(paths.naive_repaired),
        aligned_repaired=paths.aligned_repaired and curve(paths.aligned_repaired),
        plane=None,
        solver=request.recipe.solver,
        repair=request.recipe.repair,
    )


def _surface(request: _Request, pair: _Pair, frame: PlaneFrame, model: nn.Module) -> LossPlane:
    """Evaluates the plane, and tells where variances had to be raised."""
    points, device = request.pictures.plane_points, request.recipe.device
    surface = score_plane(frame, model, pair.test, points, device=device, progress=request.progress)
    if surface["clamped"]:
        request.notify(
            f"At {surface['clamped']} of {points**2} points of the plane, running variances of "
            "BatchNorm had to be kept positive."
        )
    return surface
