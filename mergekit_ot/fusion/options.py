"""Everything a user may choose about a fusion: one record, from the command line to the engine and the report.

A new choice is one field here with its help: the command line makes a flag of it, a recipe a key, a report a line.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Annotated, Any, get_type_hints

from annotated_types import Ge, Gt, Le

from mergekit_ot.errors import RecipeError

NO_REPAIR = "none"
# Samples of the calibration data at most, where nothing else is said.
MOST_SAMPLES = 2000
# More than anyone waits for.
MOST_RESTARTS = 1000
# More than any machine has cores.
MOST_THREADS = 4096


def choice(default: Any, help_text: str, metavar: str = "", commands: tuple[str, ...] = ("fuse",)) -> Any:
    """Returns a field of `FusionOptions` with what the command line says about it.

    Args:
        default: The default; a type that makes it, for mutable ones.
        help_text: One sentence for ``--help``.
        metavar: What stands for the value there.
        commands: The commands that take it as a flag.
    """
    metadata = {"help": help_text, "metavar": metavar or None, "commands": commands}
    if isinstance(default, Callable):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


_ALL = ("fuse", "align", "barrier")


@dataclass(frozen=True, kw_only=True)
class FusionOptions:
    """How networks are fused: the method and its settings, whatever the networks are.

    Attributes:
        solver: Name of a registered solver.
        solver_options: Its options by name.
        measure: What a neuron is seen by; None takes the solver's own choice.
        model_weights: One per source, non-negative; they are divided by their sum. None means equal weights.
        calibration_size: Samples of the calibration data used at most; of a language model, a sample is a sequence.
        calibration_tokens: Tokens of the calibration data used at most, in whole sequences; None sets no limit but
            `calibration_size`. Where both are given, the one that takes fewer sequences counts.
        repair: Name of a registered repair, or ``none``.
        repair_options: Its options by name.
        fallback: Whether one source alone is the result where it is surely nearer to the ensemble of all sources than
            the fused network, on calibration inputs that were held out.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps`` (scores only: couplings need double precision).
        seed: Seed of every random choice.
        refine: Whether to sweep on from the couplings found, every neuron seen by all its weights, until no gain.
        untie: Whether weights that a solver made separate stay so: a head that was the embedding becomes a tensor of
            its own, which needs an architecture without the tie.
        restarts: How often to align, each time with another seed; the least objective is kept.
        front_end: What captures the models: ``auto``, ``export`` or a registered one, such as ``make-fx``.
        trace_seconds: Seconds after which tracing is stopped; None means the default.
        trace_operations: Calls into torch after which tracing is stopped; None means the default.
        dtype: Type of the floating-point numbers that are written; None leaves each tensor that of its sources.
        widen: How many times the parameters of its target the fused model has, from 1 to 2: hidden layers grow whose
            neurons the sources need most of, which calibration data tell. `resized` loads the result.
        executor: Name of a registered executor.
        threads: Threads that torch uses; None gives each piece of work as many as it is worth.
        keep: Parameters that come from one source as they are: ``GLOB``, or ``GLOB=SOURCE`` with a number or a name.
        head: ``one``, or ``both`` where the fused model gets the heads of all sources (`MultiHead`).
        layers: Rules for single layers: mappings with ``parameters`` (a GLOB), and ``keep`` (a source), ``weights``
            (one per source, a number or a list over depth), or ``solver`` and ``measure`` (names).

    Raises:
        RecipeError: A value has another type than its field, or is below or above what means anything.

    Example:
        >>> FusionOptions(solver="gwb", seed=3).repair
        'none'
    """

    solver: str = choice("wb", "Solver; 'mergeot plugins' lists them.", "NAME", ("fuse", "align"))
    solver_options: dict[str, Any] = choice(dict, "An option of the solver; repeatable.", "KEY=VALUE", _ALL)
    measure: str | None = choice(None, "What a neuron is seen by: weights, activations …", "NAME", _ALL)
    model_weights: tuple[float, ...] | None = choice(
        None, "One per model, divided by their sum. Default: equal.", "0.5,0.5"
    )
    calibration_size: Annotated[int, Ge(1)] = choice(
        MOST_SAMPLES,
        "Calibration inputs taken from --data; of a language model, whole sequences. Default: 2000.",
        "",
        _ALL,
    )
    calibration_tokens: Annotated[int, Ge(1)] | None = choice(
        None, "In place of it: as many sequences of --data as hold at most N tokens.", "N", _ALL
    )
    repair: str = choice(
        NO_REPAIR,
        "What is done after the couplings, such as 'refit'; 'mergeot plugins' lists them. Default: none.",
        "none|NAME",
    )
    repair_options: dict[str, Any] = choice(
        dict, "An option of the repair; repeatable.", "KEY=VALUE", ("fuse", "barrier")
    )
    fallback: bool = choice(
        False,
        "Write one source alone where it is nearer to the ensemble of all than the fused model, on held-out data.",
    )
    device: str = choice("auto", "Where to compute. Default: auto.", "auto|cpu|cuda|mps", (*_ALL, "eval"))
    seed: int = choice(0, "Seed of every random choice. Default: 0.", "", _ALL)
    refine: bool = choice(
        False,
        "Sweep on from the solver's couplings, neurons seen by all their weights, until nothing gains.",
        "",
        ("fuse", "barrier"),
    )
    untie: bool = choice(
        False,
        "Leave a head that was tied to the embedding a tensor of its own, where the solver made it one.",
    )
    restarts: Annotated[int, Ge(1), Le(MOST_RESTARTS)] = choice(
        1, "Align so often, each time with another seed; keep the best. Default: 1.", "", ("fuse", "barrier")
    )
    front_end: str = choice(
        "auto",
        "What captures the network: auto, export, make-fx or symbolic. Default: auto (export, then make-fx).",
        "NAME",
        ("fuse", "align", "check", "inspect"),
    )
    trace_seconds: Annotated[float, Gt(0)] | None = choice(
        None, "Stop a trace that takes longer. Default: 300.", "SECONDS", ("fuse", "align", "check", "inspect")
    )
    trace_operations: Annotated[int, Gt(0)] | None = choice(
        None, "Stop a trace of more operations than that. Default: 100000.", "N", ("fuse", "align", "check", "inspect")
    )
    dtype: str | None = choice(
        None, "Type of the numbers that are written: float32, bfloat16 or float16. Default: that of the target.", "NAME"
    )
    widen: Annotated[float, Ge(1), Le(2)] = choice(
        1.0,
        "Parameters of the fused model, as a multiple of the target's (1 to 2): hidden layers grow that need it most.",
        "FACTOR",
    )
    executor: str = choice("serial", "What runs the steps; 'mergeot plugins' lists them. Default: serial.", "NAME")
    threads: Annotated[int, Ge(1), Le(MOST_THREADS)] | None = choice(
        None, "Threads to compute with. Default: one for small networks, up to all cores for large ones.", "N", _ALL
    )
    keep: tuple[str, ...] = choice(
        (),
        "Parameters that come from one model as they are (a number or name; the --target by default); repeatable.",
        "GLOB[=MODEL]",
    )
    head: str = choice("one", "Heads of the fused model: one, or those of all models (both). Default: one.", "one|both")
    layers: tuple[dict[str, Any], ...] = choice(
        (), "Rules for single layers: parameters, and keep, weights, solver or measure.", "", ()
    )

    def __post_init__(self) -> None:
        for name, check in _checks().items():
            value = _as_declared(name, getattr(self, name))
            problem = check(value)
            if problem:
                raise RecipeError(f"{name}={value!r:.80}: {problem}.")
            object.__setattr__(self, name, value)


def _as_declared(name: str, value: Any) -> Any:
    """Returns a value with what other libraries hold as numbers, tuples and dicts made that."""
    if name == "model_weights" and isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(weight if isinstance(weight, bool | str) else _number(weight) for weight in value)
    if name in ("keep", "layers") and isinstance(value, Iterable) and not isinstance(value, str | Mapping):
        return tuple(value)
    if isinstance(value, Mapping):
        return dict(value)
    return value if isinstance(value, bool) or not isinstance(value, Integral) else int(value)


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


@functools.cache
def _checks() -> dict[str, Callable[[object], str]]:
    """Returns field → what says why a value does not fit, in the words of a recipe's messages."""
    # Help and plugin listings, which make no options, need not pay for it.
    from pydantic import TypeAdapter, ValidationError

    def checking(hint: Any) -> Callable[[object], str]:
        adapter = TypeAdapter(hint)

        def check(value: object) -> str:
            try:
                adapter.validate_python(value, strict=True)
            except ValidationError as error:
                said = error.errors()[0]["msg"]
                return said[0].lower() + said[1:]
            return ""

        return check

    hints = get_type_hints(FusionOptions, include_extras=True)
    return {field.name: checking(hints[field.name]) for field in dataclasses.fields(FusionOptions)}


def option_fields(command: str) -> list[dataclasses.Field[Any]]:
    """Returns the fields of `FusionOptions` that a command takes as flags, in order.

    Example:
        >>> [field.name for field in option_fields("align")][:2]
        ['solver', 'solver_options']
    """
    return [field for field in dataclasses.fields(FusionOptions) if command in field.metadata["commands"]]
