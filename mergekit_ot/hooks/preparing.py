"""From what a user asks for to a checked fusion: names become methods, and models become graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from mergekit_ot.errors import DataError, RecipeError
from mergekit_ot.fusion.architecture import KnownArchitecture, with_known
from mergekit_ot.fusion.calibration import CalibrationData, calibration
from mergekit_ot.fusion.depth.sources import depth_notes, in_one_depth, is_of_depths, target_of_depth
from mergekit_ot.fusion.executor import AbstractExecutor
from mergekit_ot.fusion.judging import data_to_compare
from mergekit_ot.fusion.layer_rules import ONE, LayerRules, RuledNetworks, layer_rules
from mergekit_ot.fusion.networks import FusedNetworks
from mergekit_ot.fusion.number_types import in_one_type
from mergekit_ot.fusion.options import FusionOptions
from mergekit_ot.fusion.samples import with_limit
from mergekit_ot.fusion.setup import (
    NO_RULES,
    FusionInputs,
    FusionMethods,
    FusionSetup,
    checked_device,
    checked_seed,
    device_note,
    trace_limits,
)
from mergekit_ot.fusion.shares import checked_weights, weights_note
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.fusion.standing import needs_no_graph
from mergekit_ot.fusion.tracing import TracedModels, Tracer, trace_all
from mergekit_ot.graph.capture.inputs import as_inputs, traced_inputs
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.hooks.manager import PluginManager
from mergekit_ot.hooks.methods import (
    build,
    build_refinement,
    build_repair,
    build_solver,
    checked_solver,
    methods_of_layers,
)
from mergekit_ot.hooks.symmetries import build_symmetries
from mergekit_ot.hooks.traces import trace_memory
from mergekit_ot.scoring.batches import taken
from mergekit_ot.storage.kept import KeptRecords
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
    traces: KeptRecords | None = None,
) -> FusionSetup:
    """Returns the checked fusion; nothing heavy has run and nothing is written when an error is raised.

    Args:
        inputs: What is fused.
        options: How.
        manager: Whose methods are known.
        trace_model: `mergekit_ot.trace_model`.
        given: Methods to take instead of those that `options` names.
        traces: Where graphs are kept between runs; nowhere by default.

    Raises:
        MergeotError: Anything is wrong with the models, the options or the data.
    """
    known: dict[int, KnownArchitecture] = {}
    sources = _sources(inputs, known)
    inputs = _with_data(inputs, sources[0])
    weights = checked_weights(options.model_weights, len(sources))
    checked_seed(options.seed)
    methods = _methods(options, manager, given or GivenMethods())
    target = _target(inputs, sources, known)
    rules = _rules(options, sources, target)
    methods = replace(methods, of_layers=methods_of_layers(rules, methods, manager))
    data, examples = _data(inputs, options, methods, sources, _goal(target, sources))
    sources, notes = in_one_type(tuple(source.shaped(examples) for source in sources))
    traced = {"front_end": options.front_end, "limits": trace_limits(options)}
    goal = _goal(target, sources)
    sources, deepened = in_one_depth(sources, goal, examples, data.batches)

    def trace_networks() -> TracedModels:
        memory = None if traces is None else trace_memory(traces, manager, options, examples)
        tracer = Tracer(
            lambda model: trace_model(model, examples, manager, **traced), memory, _trying(examples, methods)
        )
        traced_models = _traced((sources, target, tracer, rules), options.widen, data)
        if not methods.uses_rotations:
            return traced_models
        # Most solvers do not ask for it, and what proves a normal form takes time to import.
        from mergekit_ot.fusion.normalising import in_normal_form

        trace = functools.partial(trace_model, example_inputs=examples, manager=manager, **traced)
        return in_normal_form(traced_models, examples, trace, inputs.may_rewrite)

    setup = FusionSetup(
        networks=FusedNetworks(sources, goal, trace_networks),
        model_weights=weights,
        methods=methods,
        inputs=examples,
        batches=data.batches,
        device=checked_device(options.device),
        options=options,
        observers=(manager.observe_step,),
        held_out=data.held_out,
        notes=(*_notes_on(options, weights), *notes, *data.notes, *depth_notes(deepened, goal)),
        deepened=deepened,
        data=inputs.data,
        rules=rules,
        needs_no_graph=not (rules or options.widen > 1) and needs_no_graph(sources, target, methods, options, weights),
    )
    if not setup.needs_no_graph:
        setup.networks.trace()
    return setup


def _notes_on(options: FusionOptions, model_weights: tuple[float, ...]) -> tuple[str, ...]:
    return (*weights_note(options.model_weights, model_weights), *device_note(options.device))


def _trying(examples: tuple[object, ...], methods: FusionMethods) -> Callable[[SourceModel, ModelGraph], ModelGraph]:
    def tried(source: SourceModel, graph: ModelGraph) -> ModelGraph:
        # Few networks ask anything, and what runs them takes time to import.
        from mergekit_ot.fusion.other_cases import in_other_cases

        return in_other_cases(source, graph, examples, methods.symmetries)

    return tried


def _traced(
    networks: tuple[tuple[SourceModel, ...], int | SourceModel, Tracer, LayerRules],
    factor: float,
    data: CalibrationData,
) -> TracedModels:
    """Returns the networks with their graphs, and the target as wide as is asked for.

    Args:
        networks: The sources, the target, what traces them, and what holds for single parameters.
        factor: Parameters of the fused network, as a multiple of the target's.
        data: By which it is chosen what grows.
    """
    sources, target, tracer, rules = networks
    if factor > 1 and rules.has_all_heads:
        raise RecipeError("A network with the heads of all models (--head both) cannot be widened: drop --widen.")
    models = trace_all(sources, target, tracer, rules)
    if factor <= 1:
        return models
    # Few fusions ask for it, and what chooses takes time to import.
    from mergekit_ot.fusion.growth.growth import wider

    goal, growth = wider(models, data.batches, factor)
    return replace(trace_all(sources, goal, tracer, rules), growth=growth)


def _sources(inputs: FusionInputs, known: dict[int, KnownArchitecture]) -> tuple[SourceModel, ...]:
    if len(inputs.models) < 1:
        raise RecipeError("There is no model to fuse. Give two or more (one, to fuse it into another size).")
    sources = [SourceModel.of(model, f"source {number}") for number, model in enumerate(inputs.models)]
    return tuple(source.of_known(with_known(source.make, known)) for source in sources)


def _with_data(inputs: FusionInputs, first: SourceModel) -> FusionInputs:
    """Returns what is fused with the calibration data as the networks take them; their targets are never read."""
    if inputs.data is None:
        return inputs
    data = taken(inputs.data, first.architecture.outline, "the calibration data", reads_targets=False)
    return replace(inputs, data=data)


def _target(
    inputs: FusionInputs, sources: tuple[SourceModel, ...], known: dict[int, KnownArchitecture]
) -> int | SourceModel:
    """Returns whose sizes are taken, once every source is known to fit its architecture."""
    for source in sources:
        source.check_state()
    if isinstance(inputs.target, int):
        return target_of_depth(sources, inputs.target)
    target = SourceModel.of(inputs.target, "the target")
    return target_of_depth(sources, target.of_known(with_known(target.make, known)))


def _goal(target: int | SourceModel, sources: tuple[SourceModel, ...]) -> SourceModel:
    """Returns the network whose sizes are taken; a number that is none is told once all is traced."""
    return target if isinstance(target, SourceModel) else sources[target if 0 <= target < len(sources) else 0]


def _rules(options: FusionOptions, sources: tuple[SourceModel, ...], target: int | SourceModel) -> LayerRules:
    """Returns what holds for single parameters; their names are looked up only where there is anything to say."""
    if not (options.keep or options.layers or options.head != ONE):
        return NO_RULES
    # A target of its own sizes is no source: what is kept comes from the first.
    number = target if isinstance(target, int) and target < len(sources) else 0
    names = tuple(_goal(target, sources).architecture.shapes)
    networks = RuledNetworks(names, tuple(source.name for source in sources), number)
    return layer_rules(options.keep, options.layers, options.head, networks)


def _methods(options: FusionOptions, manager: PluginManager, given: GivenMethods) -> FusionMethods:
    """Returns the methods that are named, and in their place those that are given."""
    solver = checked_solver(given.solver or build_solver(options.solver, options.solver_options, manager))
    return FusionMethods(
        solver=solver,
        measure=build(manager, "measure", options.measure or solver.measure),
        repair=build_repair(options.repair, options.repair_options, manager),
        executor=given.executor or build(manager, "executor", options.executor),
        refinement=build_refinement(solver, manager) if options.refine else None,
        symmetries=build_symmetries(manager),
    )


def _data(
    inputs: FusionInputs,
    options: FusionOptions,
    methods: FusionMethods,
    sources: tuple[SourceModel, ...],
    goal: SourceModel,
) -> tuple[CalibrationData, tuple[object, ...]]:
    """Returns the calibration data, none where no method needs them, and the inputs to trace with."""
    who = _who_needs_data(options, methods)
    if who and inputs.data is None:
        raise DataError(f"The {who} needs calibration data. Give some with --data (data=…); no labels are used.")
    # A repair that needs no data is judged all the same, where there are some.
    is_judged = inputs.data is not None and (methods.repair is not None or options.fallback)
    data, size, given = inputs.data, options.calibration_size, inputs.example_inputs
    # Blocks of networks of different depth are compared on the data, where there are some.
    is_read = bool(who) or is_judged or (data is not None and is_of_depths(sources, goal))
    try:
        if data is not None and is_read:
            data, size = with_limit(data, options)
        if data is not None and inputs.is_compared and not is_judged and len(inputs.models) > 1:
            held, first_batch = data_to_compare(data, size, is_read)
            examples = first_batch if is_read or given is None else as_inputs(given)
        else:
            held, examples = calibration(data, size, is_read, given, is_judged=is_judged)
    except DataError as error:
        if who:
            raise
        held, examples = calibration(inputs.data, size, False, given)
        what = "repair is not judged" if is_judged else "fused network is not compared with its sources"
        held = replace(held, notes=(*held.notes, f"The {what} on the data. {error}"))
    return held, examples if held.batches else traced_inputs(sources[0].architecture.outline, examples)


def _who_needs_data(options: FusionOptions, methods: FusionMethods) -> str:
    if methods.needs_data:
        own = next((layers.measure for layers in methods.of_layers if layers.measure is not None), methods.measure)
        name = options.measure or methods.solver.measure
        return f"measure '{name}'" if methods.measure.needs_data else f"measure '{type(own).__name__}' of a layer"
    if methods.repair is not None and methods.repair.needs_data:
        return f"repair '{options.repair}'"
    if options.widen > 1:
        return "choice of the layers that grow (--widen)"
    if options.fallback:
        return "choice between the fused model and a source (--fallback)"
    return ""
