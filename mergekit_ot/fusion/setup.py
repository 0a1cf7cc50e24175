"""Turns what a user asks for into a checked fusion: sources, graphs, solver, measure, weights, data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergekit_ot.errors import ArchitectureError, DataError, RecipeError, unknown_name
from mergekit_ot.fusion.measures import AbstractNodeMeasure
from mergekit_ot.fusion.plan import AbstractExecutor
from mergekit_ot.fusion.repair import AbstractRepair
from mergekit_ot.fusion.responses import calibration_batches, inputs_of
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.graph.capture import AUTO, as_inputs, traced_inputs
from mergekit_ot.graph.front_end import TraceLimits
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.trace import trace_model
from mergekit_ot.transport.solver import AbstractBarycenterSolver

if TYPE_CHECKING:
    from mergekit_ot.plugin_manager import PluginManager

# Samples per calibration batch: enough to fill the cores, small enough that all layers' responses fit.
CALIBRATION_BATCH = 100
# The registered solver that sweeps on from couplings in force.
REFINEMENT = "refinement"


@dataclass(frozen=True)
class FusionSetup:
    """Everything a fusion needs, checked.

    Attributes:
        sources: In the user's order.
        graphs: One per source.
        target: The architecture whose sizes the fused model takes, and its graph.
        model_weights: One per source, summing to one.
        inputs: Example inputs, for tracing and for the function check.
        batches: Calibration inputs in batches of one size, possibly none.
    """

    sources: tuple[SourceModel, ...]
    graphs: tuple[ModelGraph, ...]
    target: SourceModel
    target_graph: ModelGraph
    model_weights: tuple[float, ...]
    solver: AbstractBarycenterSolver
    measure: AbstractNodeMeasure
    repair: AbstractRepair | None
    executor: AbstractExecutor
    inputs: tuple[object, ...]
    batches: tuple[tuple[Tensor, ...], ...]
    device: torch.device
    seed: int
    manager: PluginManager
    refinement: AbstractBarycenterSolver | None = None
    restarts: int = 1


def prepare(
    models: Sequence[nn.Module | SourceModel],
    *,
    solver: str | AbstractBarycenterSolver,
    solver_options: Mapping[str, object] | None,
    example_inputs: Tensor | tuple[object, ...] | None,
    model_weights: Sequence[float] | None,
    target: int | nn.Module | SourceModel,
    measure: str | None,
    data: Iterable[Any] | None,
    calibration_size: int,
    repair: str,
    device: str,
    seed: int,
    executor: str,
    manager: PluginManager,
    refine: bool = False,
    restarts: int = 1,
    front_end: str = AUTO,
    limits: TraceLimits | None = None,
) -> FusionSetup:
    """Returns the checked fusion; nothing heavy has run and nothing is written when an error is raised."""
    if len(models) < 1:
        raise RecipeError("There is no model to fuse. Give two or more (one, to fuse it into another size).")
    sources = tuple(SourceModel.of(model, f"source {number}") for number, model in enumerate(models))
    weights = checked_weights(model_weights, len(sources))
    chosen = checked_solver(build_solver(solver, solver_options or {}, manager))
    if restarts < 1:
        raise RecipeError(f"restarts={restarts}: give how often to align, at least once.")
    seen_by = build(manager, "measure", measure or chosen.measure)
    mending = None if repair == "none" else build(manager, "repair", repair)
    for source in sources:
        source.check_state()
    needs_batches = seen_by.needs_data or (mending is not None and mending.needs_data)
    if needs_batches and data is None:
        who = f"measure '{measure or chosen.measure}'" if seen_by.needs_data else f"repair '{repair}'"
        raise DataError(f"The {who} needs calibration data. Give some with --data (data=…); no labels are used.")
    batches, inputs = _calibration(data, calibration_size, needs_batches, example_inputs)
    if not batches:
        inputs = traced_inputs(sources[0].make(), inputs)
    traced = _Tracer(inputs, manager, front_end, limits)
    graphs, goal, goal_graph = _trace_all(sources, target, traced)
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    return FusionSetup(
        sources, graphs, goal, goal_graph, weights, chosen, seen_by, mending,
        build(manager, "executor", executor), inputs, batches, where, seed, manager,
        build_refinement(chosen, manager) if refine else None, restarts,
    )  # fmt: skip


def checked_weights(model_weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Returns one weight per source; zero is a weight like any other.

    Raises:
        RecipeError: The weights are negative, too many or few, or do not sum to one.
    """
    if model_weights is None:
        return tuple(1.0 / count for _ in range(count))
    weights = tuple(float(weight) for weight in model_weights)
    if len(weights) != count:
        raise RecipeError(f"There are {len(weights)} model weights for {count} models. Give one weight per model.")
    if any(not weight >= 0 for weight in weights) or abs(sum(weights) - 1) > 1e-6:
        raise RecipeError(
            f"The model weights {list(weights)} must be non-negative and sum to one, not {sum(weights):g}."
        )
    return weights


def build_solver(
    solver: str | AbstractBarycenterSolver, options: Mapping[str, object], manager: PluginManager
) -> AbstractBarycenterSolver:
    """Returns the solver with its options set.

    Raises:
        RecipeError: The solver or an option is unknown.
    """
    if not isinstance(solver, str):
        return solver
    kind = manager.get("solver", solver)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in options:
        if name not in fields:
            raise RecipeError(unknown_name(f"option of solver '{solver}'", name, fields))
    try:
        return kind(**{name: _like_default(fields[name].default, value) for name, value in options.items()})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"The options {dict(options)} do not fit solver '{solver}': {error}.") from error


def checked_solver(solver: AbstractBarycenterSolver) -> AbstractBarycenterSolver:
    """Returns a solver whose choices the engine knows.

    Raises:
        RecipeError: ``members`` or ``scaling`` has a value that there is not.
    """
    for option, known in (("members", ("all", "first")), ("scaling", ("density", "paper"))):
        value = getattr(solver, option)
        if value not in known:
            raise RecipeError(f"Option {option}='{value}' of '{solver.name}' is unknown. Take {' or '.join(known)}.")
    return solver


def build_refinement(solver: AbstractBarycenterSolver, manager: PluginManager) -> AbstractBarycenterSolver:
    """Returns the solver that refines what `solver` found, with the options that the two share.

    Raises:
        RecipeError: No plugin brings a solver named ``refinement``.
    """
    kind = manager.get("solver", REFINEMENT)
    own = {"max_sweeps", "outgoing", "starts", "max_steps"}
    shared = {field.name for field in dataclasses.fields(kind)} - own
    given = dataclasses.fields(solver) if dataclasses.is_dataclass(solver) else ()
    return kind(**{field.name: getattr(solver, field.name) for field in given if field.name in shared})


def _like_default(default: object, value: object) -> object:
    """Returns an option given as text in the type of the option's default."""
    if not isinstance(value, str) or isinstance(default, str):
        return value
    if isinstance(default, bool):
        if value.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError(f"'{value}' is neither true nor false")
        return value.lower() in ("true", "1", "yes")
    return type(default)(value) if isinstance(default, int | float) else value


def build(manager: PluginManager, kind: str, name: str) -> Any:
    """Returns a new instance of a registered measure, repair or executor."""
    return manager.get(kind, name)()


def _calibration(
    data: Iterable[Any] | None,
    size: int,
    needs_batches: bool,
    example_inputs: Tensor | tuple[object, ...] | None,
) -> tuple[tuple[tuple[Tensor, ...], ...], tuple[object, ...]]:
    """Returns the calibration batches and the inputs to trace with, of the same shapes."""
    if data is not None and (needs_batches or example_inputs is None):
        if not needs_batches:
            return (), inputs_of(next(iter(data)))
        batches = calibration_inputs(data, size)
        return batches, batches[0]
    if example_inputs is None:
        raise ArchitectureError(
            "A model is traced at example inputs, and none are known. "
            "Pass example_inputs=… (--input-shape on the command line), or data."
        )
    return (), as_inputs(example_inputs)


def calibration_inputs(data: Iterable[Any], size: int) -> tuple[tuple[Tensor, ...], ...]:
    """Returns calibration inputs in batches of one size, at most `size` samples; trace the sources with the first.

    Raises:
        DataError: There are fewer than two samples, or a batch holds no tensor.
    """
    held = list(_limited(data, size))
    count = min(size, sum(inputs_of(item)[0].shape[0] for item in held))
    batch = min(CALIBRATION_BATCH, count)
    if batch < 2:
        raise DataError(f"The calibration data hold {count} samples; at least 2 are needed.")
    return tuple(calibration_batches(held, size, batch))


def _limited(data: Iterable[Any], size: int) -> Iterable[Any]:
    held = 0
    for item in data:
        yield item
        held += inputs_of(item)[0].shape[0]
        if held >= size:
            return


# Lists of weights and of their names that recurrent modules keep beside their parameters.
_DERIVED = frozenset({"_all_weights", "_flat_weights", "_flat_weights_names", "_flat_weight_refs"})


def is_same_architecture(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules differ in the values of their tensors at most, so that one trace serves both."""
    ours, theirs = dict(one.named_modules()), dict(other.named_modules())
    if ours.keys() != theirs.keys():
        return False
    tensors = [*one.named_parameters(), *one.named_buffers()]
    others = dict([*other.named_parameters(), *other.named_buffers()])
    if {n: (t.shape, t.dtype) for n, t in tensors} != {n: (t.shape, t.dtype) for n, t in others.items()}:
        return False
    return all(
        type(ours[path]) is type(theirs[path]) and _settings(ours[path]) == _settings(theirs[path]) for path in ours
    )


def _settings(module: nn.Module) -> dict[str, object]:
    """What a module is set to, apart from its tensors; anything that is no plain value counts by identity."""
    plain = (bool, int, float, complex, str, bytes, tuple, type(None), torch.dtype, torch.device)
    return {
        name: value if isinstance(value, plain) else id(value)
        for name, value in vars(module).items()
        if name not in nn.Module().__dict__ and name not in _DERIVED and not isinstance(value, nn.Module)
    }


class _Tracer:
    """Traces each architecture once, however many sources share it."""

    def __init__(
        self, inputs: tuple[object, ...], manager: PluginManager, front_end: str, limits: TraceLimits | None
    ) -> None:
        self.inputs, self.manager, self.front_end, self.limits = inputs, manager, front_end, limits
        self.traced: list[tuple[SourceModel, nn.Module, ModelGraph]] = []

    def graph_of(self, source: SourceModel) -> ModelGraph:
        """Returns the graph of a source."""
        model = None
        for other, instance, graph in self.traced:
            if other.make is source.make:
                return graph
            model = source.make() if model is None else model
            if is_same_architecture(model, instance):
                return graph
        model = source.make() if model is None else model
        graph = trace_model(model, self.inputs, self.manager, front_end=self.front_end, limits=self.limits)
        self.traced.append((source, model, graph))
        return graph


def _trace_all(
    sources: tuple[SourceModel, ...], target: int | nn.Module | SourceModel, tracer: _Tracer
) -> tuple[tuple[ModelGraph, ...], SourceModel, ModelGraph]:
    graphs = tuple(tracer.graph_of(source) for source in sources)
    if isinstance(target, int):
        if not 0 <= target < len(sources):
            raise RecipeError(f"Target {target} is not one of the {len(sources)} models (counted from 0).")
        goal, goal_graph = sources[target], graphs[target]
    else:
        goal = SourceModel.of(target, "the target")
        goal_graph = tracer.graph_of(goal)
    for source, graph in zip(sources, graphs, strict=True):
        goal_graph.check_same_structure(graph, goal.name, source.name)
    for key, group in goal_graph.groups.items():
        if group.size < 1:
            raise ArchitectureError(f"Group '{key}' of the target has no neurons. Give it at least one.")
    return graphs, goal, goal_graph
