"""Methods by name: solvers, measures, repairs and executors, built from what plugins registered."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

from mergekit_ot.errors import PluginError, RecipeError, blaming, unknown_name
from mergekit_ot.fusion.executor import AbstractExecutor
from mergekit_ot.fusion.layer_rules import LayerRules
from mergekit_ot.fusion.node_measure import AbstractNodeMeasure
from mergekit_ot.fusion.options import NO_REPAIR
from mergekit_ot.fusion.repair import AbstractRepair
from mergekit_ot.fusion.setup import FusionMethods, MethodsOfLayers
from mergekit_ot.hooks.manager import PluginManager
from mergekit_ot.transport.options import check_option, option_hints, read_number, words_of
from mergekit_ot.transport.solver import AbstractBarycenterSolver

_CLASSES: Mapping[str, type[Any]] = {
    "solver": AbstractBarycenterSolver,
    "measure": AbstractNodeMeasure,
    "repair": AbstractRepair,
    "executor": AbstractExecutor,
}


def build_solver(solver: str, options: Mapping[str, object], manager: PluginManager) -> AbstractBarycenterSolver:
    """Returns the solver of a name with its options set.

    Raises:
        RecipeError: The solver or an option is unknown, or an option is not what its annotation says.
    """
    kind = _kind_of(manager, "solver", solver)
    given = _checked_options(kind, f"solver '{solver}'", options)
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"The options {dict(options)} do not fit solver '{solver}': {error}.") from error


def build_repair(repair: str, options: Mapping[str, object], manager: PluginManager) -> AbstractRepair | None:
    """Returns the repair of a name with its options set; None for ``none``.

    Raises:
        RecipeError: The repair or an option is unknown, an option is not what its annotation says, or options are
            given for no repair.
        PluginError: What is registered is no class of repairs, or raises when it is made.
    """
    if repair == NO_REPAIR:
        if options:
            raise RecipeError(f"Repair option '{next(iter(options))}' is given and no repair: add --repair NAME.")
        return None
    kind = _kind_of(manager, "repair", repair)
    given = _checked_options(kind, f"repair '{repair}'", options)
    with blaming(kind, f"Repair '{repair}'"):
        return kind(**given)


def _checked_options(kind: type[Any], who: str, options: Mapping[str, object]) -> dict[str, object]:
    """Returns options of a method as its annotations have them.

    Raises:
        RecipeError: One is unknown, or not what its annotation says.
    """
    hints, given = option_hints(kind), {}
    for name, value in options.items():
        if name not in hints:
            raise RecipeError(
                unknown_name(f"option of {who}", name, hints) if hints else f"The {who} has no options: '{name}'."
            )
        given[name] = read_number(hints[name], value)
        check_option(who, name, hints[name], given[name])
    return given


def checked_solver(solver: AbstractBarycenterSolver) -> AbstractBarycenterSolver:
    """Returns a solver whose options are what their annotations say.

    A solver checks its options when it is made; one that overrides ``__post_init__`` may not have done so.

    Raises:
        RecipeError: An option, or what the engine asks of a solver, is something else.
    """
    solver.check_options()
    return solver


def refining_solver(manager: PluginManager) -> type[AbstractBarycenterSolver]:
    """Returns the registered solver that sweeps on from couplings in force (``refines``).

    Raises:
        RecipeError: No plugin brings one, or several do.
    """
    refining: dict[str, type[AbstractBarycenterSolver]] = {}
    for name, entry in manager.solvers.items():
        # Every solver is asked, and one that is broken must not take away those that are not.
        with contextlib.suppress(PluginError):
            kind = entry.load()
            if isinstance(kind, type) and issubclass(kind, AbstractBarycenterSolver) and kind.refines:
                refining[name] = kind
    if len(refining) != 1:
        have = f"There are several: {', '.join(refining)}." if refining else "No installed plugin brings one."
        raise RecipeError(
            f"--refine needs one solver that sweeps on from couplings in force. {have} Choose plugins with "
            "MERGEOT_PLUGINS; 'mergeot plugins' lists them."
        )
    return next(iter(refining.values()))


def build_refinement(solver: AbstractBarycenterSolver, manager: PluginManager) -> AbstractBarycenterSolver:
    """Returns the solver that refines what `solver` found, with the options that the two share.

    Raises:
        RecipeError: No plugin brings such a solver, or several do.
    """
    kind = refining_solver(manager)
    shared = {field.name for field in _options(kind)} - kind.own_options
    return kind(**{field.name: getattr(solver, field.name) for field in _options(solver) if field.name in shared})


def _options(solver: object) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(solver) if dataclasses.is_dataclass(solver) else ()


def options_of_methods(manager: PluginManager) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Returns what options every registered solver and repair takes: kind → name → option, default and what it is."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for kind, plural in (("solver", "solvers"), ("repair", "repairs")):
        # One that is broken must not hide the others.
        methods = found.setdefault(plural, {})
        for name in sorted(manager.table(kind)):
            with contextlib.suppress(PluginError):
                made = _kind_of(manager, kind, name)
                methods[name] = [
                    {"option": option, "default": _default(made, option), "value": words_of(hint)}
                    for option, hint in option_hints(made).items()
                ]
    return found


def _default(kind: type[Any], option: str) -> object:
    """Returns the default of an option as plain data; text for what is none."""
    field = next(field for field in _options(kind) if field.name == option)
    if field.default_factory is not dataclasses.MISSING:
        return str(field.default_factory())
    value = None if field.default is dataclasses.MISSING else field.default
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def build(manager: PluginManager, kind: str, name: str) -> Any:
    """Returns a new instance of a registered measure or executor.

    Raises:
        PluginError: What is registered is no class of that kind, or raises when it is made.
    """
    registered = _kind_of(manager, kind, name)
    with blaming(registered, f"{kind.capitalize()} '{name}'"):
        return registered()


def methods_of_layers(rules: LayerRules, methods: FusionMethods, manager: PluginManager) -> tuple[MethodsOfLayers, ...]:
    """Returns the solvers and measures that rules name for the neurons of single layers.

    Raises:
        RecipeError: One is unknown, couples nothing, or moves tensors in another way than the solver of the fusion.
    """
    found = []
    for rule in rules.methods:
        if methods.solver.max_sweeps == 0:
            raise RecipeError(f"The rule for layers '{rule.glob}' has no use: '{methods.solver.name}' couples nothing.")
        solver = build_solver(rule.solver, {}, manager) if rule.solver else None
        who = f"Solver '{rule.solver}', which the rule for layers '{rule.glob}' names,"
        if solver is not None and solver.max_sweeps == 0:
            raise RecipeError(
                f"{who} couples nothing. Keep those layers from one model ('keep'), or leave the rule out."
            )
        if solver is not None and solver.scaling != methods.solver.scaling:
            raise RecipeError(
                f"{who} moves tensors by scaling '{solver.scaling}', and the fusion's '{methods.solver.name}' by "
                f"'{methods.solver.scaling}'. One fusion has one."
            )
        measure = rule.measure or (solver.measure if solver is not None else "")
        found.append(MethodsOfLayers(rule.names, solver, build(manager, "measure", measure) if measure else None))
    return tuple(found)


def _kind_of(manager: PluginManager, kind: str, name: str) -> type[Any]:
    """Returns the class that is registered under a name.

    Raises:
        PluginError: It is no class of that kind.
    """
    registered, wanted = manager.get(kind, name), _CLASSES[kind]
    if isinstance(registered, type) and issubclass(registered, wanted):
        return registered
    raise PluginError(
        f"Plugin '{manager.table(kind)[name].plugin}' registers {kind} '{name}', which is no subclass of "
        f"{wanted.__name__} but {registered!r:.80}. Reinstall the plugin, or leave it out with MERGEOT_PLUGINS."
    )
