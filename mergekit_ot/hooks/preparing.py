"""From what a user asks for to a checked fusion: names become methods, and models become graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mergekit_ot.errors import DataError, RecipeError
from mergekit_ot.fusion.calibration import calibration
from mergekit_ot.fusion.executor import AbstractExecutor
from mergekit_ot.fusion.options import NO_REPAIR, FusionOptions
from mergekit_ot.fusion.setup import FusionInputs, FusionSetup, checked_weights, trace_limits
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.fusion.tracing import Tracer, trace_all
from mergekit_ot.graph.capture.capture import traced_inputs
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.hooks.manager import PluginManager
from mergekit_ot.hooks.methods import build, build_refinement, build_solver, checked_solver
from mergekit_ot.hooks.symmetries import build_symmetries
from mergekit_ot.transport.solver import AbstractBarycenterSolver


@dataclass(frozen=True)
class GivenMethods:
    """Methods that a caller made itself, instead of naming them."""

    solver: AbstractBarycenterSolver | None = None
    executor: AbstractExecutor | None = None


def prepare(
    inputs: FusionInputs,
    options: FusionOptions,
    manager: PluginManager,
    trace_model: Callable[..., ModelGraph],
    given: GivenMethods | None = None,
) -> FusionSetup:
    """Returns the checked fusion; nothing heavy has run and nothing is written when an error is raised.

    Args:
        inputs: What is fused.
        options: How.
        manager: Whose methods are known.
        trace_model: `mergekit_ot.trace_model`.
        given: Methods to take instead of those that `options` names.

    Raises:
        MergeotError: Anything is wrong with the models, the options or the data.
    """
    models, given = inputs.models, given or GivenMethods()
    if len(models) < 1:
        raise RecipeError("There is no model to fuse. Give two or more (one, to fuse it into another size).")
    sources = tuple(SourceModel.of(model, f"source {number}") for number, model in enumerate(models))
    weights = checked_weights(options.model_weights, len(sources))
    chosen = checked_solver(given.solver or build_solver(options.solver, options.solver_options, manager))
    measure_name = options.measure or chosen.measure
    measure = build(manager, "measure", measure_name)
    repair = None if options.repair == NO_REPAIR else build(manager, "repair", options.repair)
    for source in sources:
        source.check_state()
    needs_batches = measure.needs_data or (repair is not None and repair.needs_data)
    if needs_batches and inputs.data is None:
        who = f"measure '{measure_name}'" if measure.needs_data else f"repair '{options.repair}'"
        raise DataError(f"The {who} needs calibration data. Give some with --data (data=…); no labels are used.")
    batches, examples = calibration(inputs.data, options.calibration_size, needs_batches, inputs.example_inputs)
    if not batches:
        examples = traced_inputs(sources[0].make(), examples)
    traced = {"front_end": options.front_end, "limits": trace_limits(options)}
    tracer = Tracer(lambda model: trace_model(model, examples, manager, **traced))
    graphs, target, target_graph = trace_all(sources, inputs.target, tracer)
    return FusionSetup(
        sources=sources,
        graphs=graphs,
        target=target,
        target_graph=target_graph,
        model_weights=weights,
        solver=chosen,
        measure=measure,
        repair=repair,
        executor=given.executor or build(manager, "executor", options.executor),
        inputs=examples,
        batches=batches,
        device=torch.device(_available(options.device)),
        options=options,
        observers=(lambda report: manager.hook.mergeot_step_done(report=report),),
        refinement=build_refinement(chosen, manager) if options.refine else None,
        symmetries=build_symmetries(manager),
    )


def _available(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
