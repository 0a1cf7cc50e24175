"""Measured cells as tables: mean and standard deviation over the sets of sources, for each method and column."""

from __future__ import annotations

import itertools
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mergekit_ot import MergeotError, PluginManager
from mergeot_experiments.catalogue.descriptions import ACCURACY, FULL, Design, Experiment, Method, Setting
from mergeot_experiments.running.store import Cell, Store, code_version, content_of, newest, sources_of

_MEAN, _ENSEMBLE = "sources, mean", "ensemble"


@dataclass(frozen=True)
class Summary:
    """Accuracies over the sets of sources.

    Attributes:
        mean: Their mean.
        deviation: Their sample standard deviation; None for a single one.
        values: All of them, in the order of the sets.
    """

    mean: float
    deviation: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Returns the summary of at least one value.

        Example:
            >>> Summary.of([1.0, 2.0, 3.0])
            Summary(mean=2.0, deviation=1.0, values=(1.0, 2.0, 3.0))
        """
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, tuple(values))

    def as_json(self) -> dict[str, Any]:
        """Returns it as a part of the object of ``--json``."""
        return {"mean": self.mean, "sd": self.deviation, "count": len(self.values), "values": list(self.values)}

    def text(self, expected: int) -> str:
        """Returns mean ± standard deviation, and the number of values where it is not the expected one."""
        deviation = "" if self.deviation is None else f" ± {self.deviation:.2f}"
        return f"{self.mean:.2f}{deviation}" + ("" if len(self.values) == expected else f" ({len(self.values)})")


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        block: Which sources it is about; empty where all lines are about the same.
        name: The method, or what is measured on the sources.
        method: None for what is measured on the sources.
        command: What made it.
        summaries: Column → accuracies.
        seconds: Mean time of a fusion.
        is_current: Whether the code that measured it is the installed one.
        groups: Neuron groups of the fused network, where they were counted.
    """

    block: str
    name: str
    method: Method | None
    command: str
    summaries: Mapping[str, Summary]
    seconds: float | None
    is_current: bool
    groups: int | None = None


@dataclass(frozen=True)
class ResultTable:
    """What was measured of one experiment at one scale.

    Attributes:
        experiment: The experiment.
        scale: The scale.
        repetitions: Sets of sources, where all were run.
        sources: How the sources are trained.
        columns: In order.
        rows: In order.
        cells: What it is made of.
    """

    experiment: Experiment
    scale: str
    repetitions: int
    sources: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    cells: tuple[Cell, ...]

    @property
    def is_current(self) -> bool:
        """Whether the installed code measured all rows."""
        return all(row.is_current for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """Returns the object of ``--json``."""
        return {
            "name": self.experiment.name,
            "title": self.experiment.title,
            "scale": self.scale,
            "sets": self.repetitions,
            "sources": list(self.sources),
            "rows": [_row_as_json(row, self.experiment.metric) for row in self.rows],
        }


def _row_as_json(row: Row, metric: str) -> dict[str, Any]:
    method = {"solver": None} if row.method is None else asdict(row.method)
    return {
        "block": row.block,
        "name": row.name,
        **method,
        "command": row.command,
        "seconds": row.seconds,
        "is_current": row.is_current,
        metric: {column: summary.as_json() for column, summary in row.summaries.items()},
        **({} if metric == ACCURACY else {"groups": row.groups}),
    }


@dataclass(frozen=True)
class Selection:
    """Which of the stored cells a table shows; all of them by default."""

    methods: tuple[Method, ...] | None = None
    repetitions: int | None = None


def make_table(
    experiment: Experiment, scale: str, store: Store, manager: PluginManager, selection: Selection | None = None
) -> ResultTable | None:
    """Returns the table of what is stored; None where nothing is."""
    design, chosen = experiment.designs[scale](), selection or Selection()
    sets = range(chosen.repetitions or design.repetitions)
    rows: list[Row] = []
    cells: list[Cell] = []
    for block in dict.fromkeys(setting.row for setting in design.settings):
        settings = [setting for setting in design.settings if setting.row == block]
        maker = _Rows(experiment, scale, design, settings, sets, store, manager)
        for row, measured in maker.all(chosen.methods):
            rows.append(row)
            cells += measured
    if not rows:
        return None
    columns = tuple(dict.fromkeys(setting.column for setting in design.settings))
    return ResultTable(experiment, scale, len(sets), _trainings(design), columns, tuple(rows), tuple(cells))


def _trainings(design: Design) -> tuple[str, ...]:
    """Returns how the sources of all settings are trained, each way once."""
    sets = itertools.chain.from_iterable(setting.sources for setting in design.settings)
    return tuple(dict.fromkeys(training.description for training in itertools.chain.from_iterable(sets)))


@dataclass(frozen=True)
class _Rows:
    """Makes the rows of one block, each with the cells it was made of."""

    experiment: Experiment
    scale: str
    design: Design
    settings: Sequence[Setting]
    sets: range
    store: Store
    manager: PluginManager

    def all(self, methods: Sequence[Method] | None) -> list[tuple[Row, list[Cell]]]:
        """Returns the rows of which something is stored: of the sources, and of the methods that are shown."""
        rows = [*self.of_sources(), *map(self.of_method, self.methods(methods))]
        return [(row, cells) for row, cells in rows if row.summaries]

    def methods(self, chosen: Sequence[Method] | None) -> list[Method]:
        """Returns the methods that are shown: those of the design, then the others by name."""
        if chosen is not None:
            return list(chosen)
        own = self.design.all_methods
        stored = [self._stored_methods(setting) for setting in self.settings]
        # Experiments share cells: what another one measured in a column or two is no row of this one.
        shared = set.intersection(*map(_names, stored))
        more = [method for method in itertools.chain.from_iterable(stored) if method not in own]
        others = {method.name: method for method in more if method.name in shared}
        return [*own, *(others[name] for name in sorted(others))]

    def of_sources(self) -> Iterable[tuple[Row, list[Cell]]]:
        """Yields the rows of the sources, one for each role, and of their ensemble."""
        cells = {setting.column: self._stored(setting, sources_of) for setting in self.settings}
        used = list(itertools.chain.from_iterable(cells.values()))
        names = [f"source {role}" for role in self.settings[0].roles] or [_MEAN]
        if any(len(setting.sources[0]) > 1 for setting in self.settings):
            names.append(_ENSEMBLE)
        for name in names:
            summaries: dict[str, Summary] = {}
            for setting in self.settings:
                accuracies = [
                    _of_sources(cell, name, setting, self.experiment.metric) for cell in cells[setting.column]
                ]
                if accuracies:
                    summaries[setting.column] = Summary.of(accuracies)
            yield Row(self.settings[0].row, name, None, self._command(None), summaries, None, True), used

    def of_method(self, method: Method) -> tuple[Row, list[Cell]]:
        """Returns the row of a method: of the installed code where it was measured, else of the newest that was."""
        cells = {setting.column: self._stored_of(setting, method) for setting in self.settings}
        current = code_version(method, self.manager) if method.solver in self.manager.solvers else ""
        version = _shown_version(list(itertools.chain.from_iterable(cells.values())), current)
        used: list[Cell] = []
        summaries: dict[str, Summary] = {}
        for column, stored in cells.items():
            measured = [cell for cell in stored if cell.version == version]
            if measured:
                summaries[column] = Summary.of([_number(cell, self.experiment.metric) for cell in measured])
                used += measured
        seconds = statistics.fmean(_number(cell, "seconds") for cell in used) if used else None
        counts = [count for cell in used if isinstance(count := cell.result.get("groups"), int)]
        row = Row(
            self.settings[0].row,
            method.name,
            method,
            self._command(method),
            summaries,
            seconds,
            version == current,
            max(counts, default=None),
        )
        return row, used

    def _stored(self, setting: Setting, content: Callable[[Setting, int], dict[str, object]]) -> list[Cell]:
        """Returns all that is stored of a setting's sets of sources, or of what is fused of them."""
        cells: list[Cell] = []
        for number in self.sets:
            cells += self.store.of_content(content(setting, number))
        return cells

    def _stored_of(self, setting: Setting, method: Method) -> list[Cell]:
        return [cell for cell in self._stored(setting, content_of) if cell.method == method]

    def _stored_methods(self, setting: Setting) -> list[Method]:
        return [cell.method for cell in self._stored(setting, content_of) if cell.method]

    def _command(self, method: Method | None) -> str:
        words = ["mergeot", "experiments", "run", self.experiment.name]
        if self.scale == FULL:
            words.append("--full")
        if method is not None:
            words += method.flags
        if len(self.sets) != self.design.repetitions:
            words += ["--seeds", str(len(self.sets))]
        return shlex.join(words)


def _names(methods: Iterable[Method]) -> set[str]:
    return {method.name for method in methods}


def _shown_version(cells: Sequence[Cell], current: str) -> str:
    """Returns the version of the code whose measurements are shown: the installed one where there are any."""
    latest = newest(cell for cell in cells if cell.version == current) or newest(cells)
    return latest.version if latest is not None else current


def _of_sources(cell: Cell, name: str, setting: Setting, metric: str) -> float:
    suffix = "" if metric == ACCURACY else f"_{metric}"
    each: Any = cell.result[f"each{suffix}"]
    if name == _ENSEMBLE:
        return _number(cell, f"ensemble{suffix}")
    if name == _MEAN:
        return statistics.fmean(each)
    # The roles of a setting say in which order its sources stand.
    return float(each[setting.roles.index(name.removeprefix("source "))])


def _number(cell: Cell, name: str) -> float:
    value = cell.result[name]
    if not isinstance(value, int | float):
        raise MergeotError(f"A stored measurement has no number '{name}'. Measure it anew: --again.")
    return float(value)
