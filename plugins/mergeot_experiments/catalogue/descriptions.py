"""What an experiment is, as data: which networks are fused, into which sizes, by which methods.

An `Experiment` has a `Design` for each scale; a design is a list of settings times a list of methods; a setting names
several sets of sources, over which the mean and the standard deviation are taken.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mergeot_experiments.sources.training import Training

QUICK, FULL, DIGITS = "quick", "full", "digits"
ACCURACY, LOSS = "accuracy", "loss"


@dataclass(frozen=True)
class Method:
    """How sources are fused.

    Attributes:
        solver: A registered solver.
        options: Its options where they are not the defaults.
        refine: Whether to sweep on from the solver's couplings.
        restarts: How often to align.
        measure: What a neuron is seen by; the solver's own choice where it is None.
        repair: What is done after the couplings; the setting's own choice where it is None.
    """

    solver: str
    options: Mapping[str, object] = field(default_factory=dict)
    refine: bool = False
    restarts: int = 1
    measure: str | None = None
    repair: str | None = None

    @property
    def name(self) -> str:
        """The solver and what is set about it, as a row of the table is called.

        Example:
            >>> Method("wb", {"epsilon": 0.01}, refine=True).name
            'wb, epsilon 0.01, refined'
        """
        words = [self.solver, *(f"{key} {value}" for key, value in sorted(self.options.items()))]
        words += [self.measure] if self.measure is not None else []
        words += ["refined"] if self.refine else []
        words += [f"repair {self.repair}"] if self.repair is not None else []
        words += [f"best of {self.restarts}"] if self.restarts > 1 else []
        return ", ".join(words)

    @property
    def flags(self) -> tuple[str, ...]:
        """What chooses it on the command line."""
        flags = ["--solver", self.solver]
        for key, value in sorted(self.options.items()):
            flags += ["--solver-option", f"{key}={_plain(value)}"]
        flags += ["--measure", self.measure] if self.measure is not None else []
        flags += ["--refine"] if self.refine else []
        flags += ["--repair", self.repair] if self.repair is not None else []
        flags += ["--restarts", str(self.restarts)] if self.restarts > 1 else []
        return tuple(flags)


def _plain(value: object) -> str:
    """Returns an option's value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class Target:
    """The sizes of the fused model, as a registered architecture with its arguments."""

    architecture: str
    arguments: Mapping[str, object]


@dataclass(frozen=True)
class Setting:
    """What is fused into what: one column of the table, in one of its blocks of rows.

    Attributes:
        row: The block of rows it stands in; empty where there is one block.
        column: Its column.
        sources: One set of sources for each repetition.
        target: The sizes of the fused model; those of the first source where it is None.
        model_weights: One for each source; equal where it is None.
        repair: What is done after the couplings.
        roles: What tells the sources of a set apart; each then has a row of its own. Empty where only their seeds do.
        more: Methods that are measured here besides those of the design.
    """

    row: str
    column: str
    sources: tuple[tuple[Training, ...], ...]
    target: Target | None = None
    model_weights: tuple[float, ...] | None = None
    repair: str = "none"
    roles: tuple[str, ...] = ()
    more: tuple[Method, ...] = ()


@dataclass(frozen=True)
class Design:
    """An experiment at one scale.

    Attributes:
        settings: In the order of the table.
        methods: Measured in every setting.
    """

    settings: tuple[Setting, ...]
    methods: tuple[Method, ...]

    def methods_of(self, setting: Setting) -> tuple[Method, ...]:
        """Returns what is measured in a setting where the user names no solver."""
        return (*self.methods, *setting.more)

    @property
    def all_methods(self) -> tuple[Method, ...]:
        """The methods of all settings, each once."""
        methods: dict[str, Method] = {}
        for setting in self.settings:
            methods |= {method.name: method for method in self.methods_of(setting)}
        return tuple(methods.values())

    @property
    def repetitions(self) -> int:
        """Sets of sources that every setting has."""
        return min(len(setting.sources) for setting in self.settings)


@dataclass(frozen=True)
class Experiment:
    """Something that is measured under one name.

    Attributes:
        name: On the command line.
        title: Above its table.
        summary: A sentence for the list.
        designs: Gives the design for each scale: ``quick``, ``full``, and ``digits`` (which takes the place of
            ``quick`` where no data folder is named).
        metric: What its tables show: ``accuracy`` in percent, or ``loss``, with the number of neuron groups beside it.
    """

    name: str
    title: str
    summary: str
    designs: Mapping[str, Callable[[], Design]]
    metric: str = ACCURACY
